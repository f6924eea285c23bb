//! The files of a GGUF model: one, or the parts that llama.cpp's `gguf-split` cut it into. Each part has a header of its
//! own; the first one's metadata is the model's.

use super::header::{Header, shown};
use super::metadata::Metadata;
use crate::error::ModelError;
use crate::mapped::MappedFile;
use std::path::{Path, PathBuf};

/// Parts of one model. Published models have some dozen; each is an open map.
const PARTS_MAX: u64 = 1024;

/// A model's files, mapped.
#[derive(Debug)]
pub(super) struct Parts {
    files: Vec<(PathBuf, MappedFile)>,
}

impl Parts {
    /// Maps the file `path`, and if it is a part of a model, all the others.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let file = MappedFile::open(path)?;
        let count = split_count(&Header::parse(path, file.bytes(), 0)?.metadata)?;
        if count <= 1 {
            let files = vec![(path.to_owned(), file)];
            return Ok(Parts { files });
        }
        let bad = |reason: String| ModelError::gguf(path, reason);
        if count > PARTS_MAX {
            return Err(bad(format!("it claims to be one of {count} parts")));
        }
        let (stem, _, total) = part_name(path).filter(|(_, _, total)| *total == count).ok_or_else(|| {
            bad(format!(
                "it is one of {count} parts, so its name must end like `-00001-of-{count:05}.gguf`"
            ))
        })?;
        let open = |number| {
            let path = path.with_file_name(format!("{stem}-{number:05}-of-{total:05}.gguf"));
            let file = MappedFile::open(&path)?;
            Ok((path, file))
        };
        let files = (1..=count).map(open).collect::<Result<Vec<_>, ModelError>>()?;
        Ok(Parts { files })
    }

    /// The header of the whole model.
    pub fn header(&self) -> Result<Header<'_>, ModelError> {
        let mut whole: Option<Header<'_>> = None;
        for (part, (path, file)) in self.files.iter().enumerate() {
            let header = Header::parse(path, file.bytes(), part)?;
            let bad = |reason: String| ModelError::gguf(path, reason);
            if self.files.len() > 1 {
                let number = header.metadata.unsigned("split.no")?;
                if number != Some(part as u64) || split_count(&header.metadata)? != self.files.len() as u64 {
                    return Err(bad("it is not the part that its name says".into()));
                }
            }
            match &mut whole {
                None => whole = Some(header),
                Some(whole) => {
                    for (name, info) in header.tensors {
                        if whole.tensors.insert(name, info).is_some() {
                            return Err(bad(format!("it has the tensor `{}` of another part", shown(name))));
                        }
                    }
                }
            }
        }
        whole.ok_or_else(|| ModelError::gguf(Path::new(""), "it has no parts"))
    }

    /// The file that holds the tensors of `part`.
    pub fn file(&self, part: usize) -> &MappedFile {
        &self.files[part].1
    }
}

fn split_count(metadata: &Metadata<'_>) -> Result<u64, ModelError> {
    Ok(metadata.unsigned("split.count")?.unwrap_or(1))
}

/// What the name of a part says: `stem-00002-of-00003.gguf` is number 2 of 3.
pub(super) fn part_name(path: &Path) -> Option<(&str, u64, u64)> {
    let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
    let (rest, total) = name.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    let parsed = |text: &str| text.parse().ok().filter(|_| digits(text));
    Some((stem, parsed(number)?, parsed(total)?))
}
