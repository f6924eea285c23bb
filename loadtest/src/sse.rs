//! An incremental parser of server-sent events: bytes in, split anywhere, `data` payloads out. Event names, ids and
//! retry hints are read over: the OpenAI stream has none. It holds no socket and no clock.

/// Largest event in bytes. Chunks of a chat stream are hundreds of bytes; a megabyte is a server gone wrong.
pub const EVENT_BYTES_MAX: usize = 1 << 20;

/// The stream is not what it claims to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an event of the stream is larger than {EVENT_BYTES_MAX} bytes")]
pub struct SseError;

/// Parser state between two pieces of the body.
#[derive(Debug, Default)]
pub struct SseParser {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    /// The last byte was a CR, so an LF right after it belongs to the same line end.
    after_cr: bool,
    started: bool,
}

impl SseParser {
    /// Feeds a piece of the body and calls `event` with the payload of each event that it completes.
    pub fn push(&mut self, bytes: &[u8], mut event: impl FnMut(&[u8])) -> Result<(), SseError> {
        let mut rest = bytes;
        while let Some(&first) = rest.first() {
            if std::mem::take(&mut self.after_cr) && first == b'\n' {
                rest = &rest[1..];
                continue;
            }
            match rest.iter().position(|&b| b == b'\n' || b == b'\r') {
                None => {
                    self.extend_line(rest)?;
                    break;
                }
                Some(end) => {
                    self.extend_line(&rest[..end])?;
                    self.after_cr = rest[end] == b'\r';
                    rest = &rest[end + 1..];
                    self.end_line(&mut event)?;
                }
            }
        }
        Ok(())
    }

    fn extend_line(&mut self, piece: &[u8]) -> Result<(), SseError> {
        if self.line.len() + piece.len() > EVENT_BYTES_MAX {
            return Err(SseError);
        }
        self.line.extend_from_slice(piece);
        Ok(())
    }

    fn end_line(&mut self, event: &mut impl FnMut(&[u8])) -> Result<(), SseError> {
        if !std::mem::replace(&mut self.started, true) && self.line.starts_with(b"\xEF\xBB\xBF") {
            self.line.drain(..3);
        }
        if self.line.is_empty() {
            if std::mem::take(&mut self.has_data) {
                event(&self.data);
            }
            self.data.clear();
            return Ok(());
        }
        let value = match self.line.strip_prefix(b"data") {
            Some([]) => Some(&[][..]),
            Some([b':', b' ', value @ ..] | [b':', value @ ..]) => Some(value),
            _ => None,
        };
        if let Some(value) = value {
            if self.data.len() + value.len() > EVENT_BYTES_MAX {
                return Err(SseError);
            }
            if self.has_data {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(value);
            self.has_data = true;
        }
        self.line.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(pieces: &[&[u8]]) -> Vec<String> {
        let (mut parser, mut events) = (SseParser::default(), Vec::new());
        for piece in pieces {
            parser
                .push(piece, |e| events.push(String::from_utf8_lossy(e).into_owned()))
                .expect("small events");
        }
        events
    }

    #[test]
    fn reads_what_servers_send() {
        assert_eq!(parse(&[b"data: a\n\ndata:b\r\n\r\ndata: c\r\r"]), ["a", "b", "c"]);
        assert_eq!(
            parse(&[b": keep-alive\n\nevent: x\nid: 1\ndata: a\ndata: b\n\n"]),
            ["a\nb"]
        );
        assert_eq!(parse(&[b"\xEF\xBB\xBFdata: a\n\n"]), ["a"]);
        assert_eq!(parse(&[b"data\n\ndatabase: x\n\n"]), [""]);
        assert_eq!(parse(&[b"data: cut off"]), Vec::<String>::new());
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut parser = SseParser::default();
        let megabyte = vec![b'x'; EVENT_BYTES_MAX];
        assert_eq!(parser.push(&megabyte, |_| {}), Ok(()));
        assert_eq!(parser.push(b"x", |_| {}), Err(SseError));
    }

    #[test]
    fn an_endless_event_is_refused() {
        let mut parser = SseParser::default();
        let line = [b"data: ".as_slice(), &[b'x'; 65536], b"\n"].concat();
        let refused = (0..64).any(|_| parser.push(&line, |_| {}).is_err());
        assert!(refused);
    }

    proptest! {
        /// Where the body is cut does not matter.
        #[test]
        fn splits_do_not_matter(
            lines in prop::collection::vec("(data: ?|: |id: |)[a-z\u{e9}]{0,6}", 0..20),
            ends in prop::collection::vec(prop::sample::select(vec!["\n", "\r\n", "\r"]), 20),
            cuts in prop::collection::vec(0usize..400, 0..12),
        ) {
            let body: Vec<u8> = lines.iter().zip(&ends).flat_map(|(l, e)| [l.as_bytes(), e.as_bytes()].concat()).collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c % (body.len() + 1)).collect();
            cuts.extend([0, body.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|w| &body[w[0]..w[1]]).collect();
            prop_assert_eq!(parse(&pieces), parse(&[&body]));
        }
    }
}
