//! Layer archives in, one EROFS image out, in one pass.
//!
//! Owns the tar parser that the whole project uses, the rules by which layers are stacked (whiteouts, hard links, implicit
//! directories), and the on-disk format. Must not know registries, digests, compression or stores: it is given uncompressed archives,
//! bottom layer first, and an empty file. Nothing out of a layer ever becomes a file, a name or a mount on the host; contents go block
//! aligned into the output while they stream by, and only names and metadata are kept in memory.
//!
//! A layer is hostile input. What is refused, and what is silently left out, is written down in this crate's README.

mod builder;
mod error;
mod layout;
mod limits;
mod members;
mod metadata;
mod output;
mod path;
mod resolve;
mod tar;
mod tree;
mod xattr;

pub use builder::{ImageBuilder, ImageSummary, LayerSummary};
pub use error::{ArchiveProblem, EntryProblem, ErofsError, ErrorKind, LimitKind};
pub use limits::Limits;
pub use members::{Member, MemberContent, members};
