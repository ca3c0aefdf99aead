//! Stop strings in a text that comes piece by piece. What may be the beginning of one is held back until it is clear.

/// Watches one answer.
pub(crate) struct StopWatch {
    stops: Vec<String>,
    held: String,
}

impl StopWatch {
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// The text that is now certain to belong to the answer, and whether a stop string has ended it.
    pub(crate) fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        if let Some(at) = first_complete(&self.held, &self.stops) {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let unclear = self.stops.iter().map(|stop| longest_beginning_at_end(&self.held, stop)).max().unwrap_or(0);
        let certain = self.held.len() - unclear;
        let rest = self.held.split_off(certain);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, when nothing more comes.
    pub(crate) fn finish(self) -> String {
        self.held
    }
}

/// Where the stop string begins that is complete first, the earlier one of two that end together. By ends, not beginnings: a longer
/// one that began before might still have come true, but what comes next is not known when an answer is streamed.
fn first_complete(text: &str, stops: &[String]) -> Option<usize> {
    let found = stops.iter().filter_map(|stop| text.find(stop.as_str()).map(|at| (at + stop.len(), at)));
    found.min().map(|(_, at)| at)
}

/// Bytes of the longest proper beginning of `stop` with which `text` ends.
fn longest_beginning_at_end(text: &str, stop: &str) -> usize {
    stop.char_indices().map(|(at, _)| at).rev().find(|&at| text.ends_with(&stop[..at])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_stop_string_over_several_pieces_is_found_and_never_shown() {
        let mut watch = StopWatch::new(vec!["\n\nHuman:".into(), "END".into()]);
        assert_eq!(watch.push("Hello E"), ("Hello ".into(), false));
        assert_eq!(watch.push("NTRY\n"), ("ENTRY".into(), false));
        assert_eq!(watch.push("\nHum"), ("".into(), false));
        assert_eq!(watch.push("an: x"), ("".into(), true));
    }

    #[test]
    fn what_was_held_back_comes_at_the_end() {
        let mut watch = StopWatch::new(vec!["é!".into()]);
        assert_eq!(watch.push("café"), ("caf".into(), false));
        assert_eq!(watch.finish(), "é");
    }

    #[test]
    fn the_one_that_is_complete_first_ends_the_answer() {
        for pieces in [vec!["éb", "é"], vec!["ébé"]] {
            let mut watch = StopWatch::new(vec!["ébé".into(), "b".into()]);
            assert_eq!(watch.push(pieces[0]), ("é".into(), true), "{pieces:?}");
        }
        assert_eq!(StopWatch::new(vec!["b".into(), "ab".into()]).push("aab"), ("a".into(), true));
    }

    proptest! {
        /// Cut anywhere, the shown text is the text before the stop string that is complete first.
        #[test]
        fn pieces_do_not_matter(pieces in prop::collection::vec("[abé]{0,3}", 0..12), stops in prop::collection::vec("[abé]{1,3}", 0..3)) {
            let text = pieces.concat();
            let ends = (0..=text.len()).filter(|&end| text.is_char_boundary(end));
            let end = ends.into_iter().find_map(|end| {
                stops.iter().filter_map(|stop| text[..end].strip_suffix(stop.as_str())).map(str::len).min()
            });
            let (mut watch, mut shown, mut hit) = (StopWatch::new(stops), String::new(), false);
            for piece in &pieces {
                let (more, stopped) = watch.push(piece);
                shown.push_str(&more);
                hit = stopped;
                if stopped { break }
            }
            if !hit { shown.push_str(&watch.finish()) }
            prop_assert_eq!(hit, end.is_some());
            prop_assert_eq!(&shown, &text[..end.unwrap_or(text.len())]);
        }
    }
}
