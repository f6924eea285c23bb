//! Tests of [`super`].

use super::*;
use proptest::prelude::*;

const LANE: LaneKey = LaneKey { slot: 3, generation: 4 };

#[derive(Debug, Clone)]
enum Frame {
    Write(u64, Vec<u8>),
    Mark,
}

fn frames() -> impl Strategy<Value = Vec<Frame>> {
    let write = (any::<u64>(), prop::collection::vec(any::<u8>(), 0..50)).prop_map(|(at, b)| Frame::Write(at, b));
    prop::collection::vec(prop_oneof![4 => write, 1 => Just(Frame::Mark)], 0..12)
}

fn integrity() -> impl Strategy<Value = Integrity> {
    any::<bool>().prop_map(Integrity::of)
}

fn write(encoder: &mut FrameEncoder, out: &mut BytesMut, offset: u64, bytes: &[u8]) {
    encoder.write(out, offset, bytes.len(), |to| to.copy_from_slice(bytes));
}

/// Decodes everything; the two ways of giving a write read the same.
fn decode(integrity: Integrity, input: &[u8], splits: &[usize]) -> Result<Vec<String>, Refusal> {
    let mut decoder = FrameDecoder::new(integrity);
    let (mut seen, mut data) = (Vec::new(), Vec::new());
    let (mut rest, mut splits) = (input, splits.iter().cycle());
    while !rest.is_empty() {
        let mut part = take(&mut rest, *splits.next().unwrap_or(&usize::MAX));
        while let Some(piece) = decoder.next(&mut part)? {
            if !matches!(piece, Piece::Bytes(_)) && !data.is_empty() {
                seen.push(format!("{data:?}"));
                data.clear();
            }
            match piece {
                Piece::Bytes(bytes) => data.extend_from_slice(bytes),
                Piece::Whole { offset, bytes } => {
                    seen.push(format!(
                        "{:?}",
                        Piece::Write {
                            offset,
                            len: bytes.len() as u32
                        }
                    ));
                    data.extend_from_slice(&bytes);
                }
                other => seen.push(format!("{other:?}")),
            }
        }
        assert!(part.is_empty(), "a decoder without an error takes all input");
    }
    Ok(seen)
}

/// A whole lane and what it decodes to.
fn lane(integrity: Integrity, frames: &[Frame], payload: &[u8]) -> (BytesMut, Vec<String>) {
    let (mut wire, mut encoder) = (BytesMut::new(), FrameEncoder::new(integrity));
    encoder.open(&mut wire, 7, 8, LANE);
    let mut expected = vec![format!(
        "{:?}",
        Piece::Open {
            window: 7,
            push: 8,
            lane: LANE
        }
    )];
    for frame in frames {
        match frame {
            Frame::Write(offset, bytes) => {
                write(&mut encoder, &mut wire, *offset, bytes);
                expected.push(format!(
                    "{:?}",
                    Piece::Write {
                        offset: *offset,
                        len: bytes.len() as u32
                    }
                ));
                if !bytes.is_empty() {
                    expected.push(format!("{bytes:?}"));
                }
            }
            Frame::Mark => {
                encoder.mark(&mut wire);
                expected.push(format!("{:?}", Piece::Mark));
            }
        }
    }
    encoder.finish(&mut wire, 99, payload, true);
    let payload = Bytes::copy_from_slice(payload);
    expected.push(format!(
        "{:?}",
        Piece::Finish {
            total: 99,
            payload,
            notify: true
        }
    ));
    (wire, expected)
}

proptest! {
    #[test]
    fn any_split_decodes_the_same(
        frames in frames(), payload in prop::collection::vec(any::<u8>(), 0..40), integrity in integrity(),
        splits in prop::collection::vec(1usize..20, 1..10),
    ) {
        let (wire, expected) = lane(integrity, &frames, &payload);
        prop_assert_eq!(decode(integrity, &wire, &splits).unwrap(), expected.clone());
        prop_assert_eq!(decode(integrity, &wire, &[1]).unwrap(), expected);
    }

    /// A flipped bit anywhere is found before anything of its frame is passed on.
    #[test]
    fn damage_is_found(
        frames in frames(), at in any::<prop::sample::Index>(), bit in 0u32..8, split in 1usize..30,
    ) {
        let (mut wire, expected) = lane(Integrity::Checksum, &frames, b"payload");
        let at = at.index(wire.len());
        wire[at] ^= 1 << bit;
        let mut decoder = FrameDecoder::new(Integrity::Checksum);
        let (mut seen, mut damaged) = (Vec::new(), false);
        'all: for mut part in wire.chunks(split) {
            loop {
                match decoder.next(&mut part) {
                    Ok(Some(Piece::Whole { offset, bytes })) => {
                        seen.push(format!("{:?}", Piece::Write { offset, len: bytes.len() as u32 }));
                        if !bytes.is_empty() {
                            seen.push(format!("{:?}", bytes.to_vec()));
                        }
                    }
                    Ok(Some(piece)) => seen.push(format!("{piece:?}")),
                    Ok(None) => break,
                    Err(refusal) => {
                        prop_assert_eq!(refusal, Refusal::Corrupt);
                        damaged = true;
                        break 'all;
                    }
                }
            }
        }
        // A damaged length may leave the decoder waiting; it never passes the frame on.
        prop_assert!(damaged || seen.len() < expected.len());
        prop_assert!(expected.starts_with(&seen), "{seen:?}");
    }

    #[test]
    fn arbitrary_bytes_never_panic(
        input in prop::collection::vec(any::<u8>(), 0..400), split in 1usize..9, integrity in integrity(),
    ) {
        let _ = decode(integrity, &input, &[split]);
        let mut opened = BytesMut::new();
        FrameEncoder::new(integrity).open(&mut opened, 1, 2, LANE);
        opened.extend(&input);
        let _ = decode(integrity, &opened, &[split]);
        let mut replies = ReplyDecoder::new(integrity);
        for mut part in input.chunks(split) {
            while let Ok(Some(_)) = replies.next(&mut part) {}
        }
    }

    #[test]
    fn replies_survive_any_split(
        code in any::<u8>(), a in any::<u64>(), b in any::<u64>(), split in 1usize..19, integrity in integrity(),
    ) {
        let refusal = Refusal::from_wire(code, a, b);
        let sent = [Reply::Landed(a), Reply::Refused(refusal), Reply::Done(b)];
        let mut wire = BytesMut::new();
        sent.iter().for_each(|reply| reply.put_with(&mut wire, integrity));
        let (mut decoder, mut seen) = (ReplyDecoder::new(integrity), Vec::new());
        for mut part in wire.chunks(split) {
            while let Some(reply) = decoder.next(&mut part).unwrap() {
                seen.push(reply);
            }
        }
        prop_assert_eq!(&seen[..], &sent[..]);
    }
}

#[test]
fn damaged_replies_are_found() {
    let mut wire = BytesMut::new();
    Reply::Landed(64).put_with(&mut wire, Integrity::Checksum);
    for bit in 0..wire.len() * 8 {
        let mut damaged = wire.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let mut decoder = ReplyDecoder::new(Integrity::Checksum);
        let result = decoder.next(&mut &damaged[..]);
        assert!(
            matches!(result, Err(BadReply::Corrupt) | Ok(None)),
            "bit {bit}: {result:?}"
        );
    }
}

#[test]
fn order_and_size_are_enforced() {
    let refused = |bytes: &[u8]| decode(Integrity::Transport, bytes, &[usize::MAX]).unwrap_err();
    let opened = || {
        let (mut wire, mut encoder) = (BytesMut::new(), FrameEncoder::new(Integrity::Transport));
        encoder.open(&mut wire, 1, 2, LANE);
        (wire, encoder)
    };
    assert_eq!(refused(&[MARK]), Refusal::Malformed { tag: MARK });
    assert_eq!(refused(&[0]), Refusal::Malformed { tag: 0 });
    let (mut twice, mut encoder) = opened();
    encoder.open(&mut twice, 1, 2, LANE);
    assert_eq!(refused(&twice), Refusal::Malformed { tag: OPEN });
    let (mut after, mut encoder) = opened();
    encoder.finish(&mut after, 0, b"", false);
    encoder.mark(&mut after);
    assert_eq!(refused(&after), Refusal::Malformed { tag: MARK });
    let (mut long, _) = opened();
    long.put_u8(WRITE);
    long.put_u64_le(0);
    long.put_u32_le(FRAME_BYTES_MAX as u32 + 1);
    assert!(matches!(refused(&long), Refusal::FrameTooLong { .. }));
    let (mut heavy, _) = opened();
    heavy.put_u8(FINISH);
    heavy.put_u64_le(0);
    heavy.put_u32_le(PAYLOAD_BYTES_MAX as u32 + 1);
    heavy.put_u8(0);
    assert!(matches!(refused(&heavy), Refusal::PayloadTooLong { .. }));
}
