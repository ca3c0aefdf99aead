"""The chat page in a real browser: a message is answered, the strip is drawn, keyboard and a phone's width work.

usage: chat_page.py URL [SCREENSHOT.png]
The model must remember fewer tokens than the question has (about 120), or every cell of the strip has one colour:
`sluice quantize --model M --top-k 32 --window 32 --route-every 16 --out DIR`.
Needs the package `playwright` and a Chromium (CHROMIUM, or else /usr/bin/chromium); exits with 77 without them.
"""

import os
import sys
import time

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    print("the package `playwright` is missing; python3 -m pip install playwright")
    sys.exit(77)

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
QUESTION = (
    "A canal company keeps four locks between the harbour and the upper lake. The first opens at six in the morning, the second an hour later, "
    "and the keeper of the third, Mrs. Alder, opens only when a boat rings the bell twice. The fourth has been shut since the flood of 1908. "
    "In two or three sentences: who must ring the bell, how often, and why can no boat reach the lake today?"
)


def until(page, condition, seconds):
    """Wait for a condition of the page; its content security policy forbids Playwright's own wait, which evaluates text inside the page."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"not within {seconds} s: {condition}"
        page.wait_for_timeout(100)


def main(url, screenshot=None):
    if not os.path.exists(CHROMIUM):
        print(f"no Chromium at {CHROMIUM}; set CHROMIUM")
        sys.exit(77)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 860}, device_scale_factor=2)
        problems, foreign = [], []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: foreign.append(request.url) if not request.url.startswith((url, "data:")) else None)
        page.goto(url)
        until(page, "document.getElementById('facts').textContent.includes('remembers')", 30)

        # By keyboard alone: the message has the focus.
        page.keyboard.type(QUESTION)
        page.keyboard.press("Enter")
        page.wait_for_selector("#talk li.assistant", timeout=60_000)
        until(page, "!document.querySelector('li.live')", 180)
        answer = page.locator("#talk li.assistant").inner_text()
        assert len(answer) > 20, answer
        assert "tokens/s" in page.locator("#speed").inner_text()

        # The strip shows what the server said: painted cells, of more than one colour.
        label = page.locator("#cells").get_attribute("aria-label")
        assert "prompt tokens still held" in label, label
        colours = page.evaluate(
            "() => { const c = document.getElementById('cells'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
            "const s = new Set(); for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 250) s.add(d[i] + ',' + d[i + 1] + ',' + d[i + 2]); return s.size; }"
        )
        assert colours > 1, f"one colour: {label}; the model must remember fewer tokens than the question has"
        page.locator("#cells").focus()
        page.keyboard.press("ArrowRight")
        assert "layers" in page.locator("#token").inner_text()
        page.locator("#text").focus()
        if screenshot:
            page.screenshot(path=screenshot)

        # A phone: nothing wider than the screen.
        page.set_viewport_size({"width": 360, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        if screenshot:
            page.screenshot(path=screenshot.replace(".png", "-phone.png"))

        # Escape stops an answer; what was said stays.
        page.keyboard.type("Tell me a long story about a river.")
        page.keyboard.press("Enter")
        page.wait_for_selector("li.live")
        until(page, "document.querySelector('li.live').textContent.length > 0", 60)
        page.keyboard.press("Escape")
        until(page, "!document.querySelector('li.live')", 10)
        page.get_by_role("button", name="New chat").click()
        assert page.locator("#talk li").count() == 0 and page.locator("#strip").is_hidden()
        assert not problems and not foreign, (problems, foreign)
        browser.close()
    print(f"answered: {answer!r}\nstrip: {label}, {colours} colours")


if __name__ == "__main__":
    main(*sys.argv[1:])
