//! Layer archives in, EROFS images out, in two steps: each layer is converted once, in one pass; the metadata of an image is composed of
//! its converted layers. And back: out of a converted layer an archive is made again.
//!
//! Owns the tar parser that the whole project uses, the rules by which layers are stacked (whiteouts, hard links, implicit
//! directories), and the on-disk formats. Must not know registries, digests, compression or stores: it is given uncompressed archives and
//! places to write to. Nothing out of a layer ever becomes a file, a name or a mount on the host; contents go block aligned into the
//! converted layer while they stream by, and only names and metadata of an image are kept in memory while it is composed.
//!
//! A layer is hostile input. What is refused, and what is silently left out, is written down in this crate's README.

mod compose;
mod convert;
mod error;
mod layout;
mod limits;
mod members;
mod metadata;
mod output;
mod path;
mod record;
mod resolve;
mod restore;
mod tar;
mod tree;
mod xattr;

pub use compose::{Composer, ImageSummary};
pub use convert::{LayerSummary, convert_layer};
pub use error::{ArchiveProblem, EntryProblem, ErofsError, ErrorKind, LimitKind};
pub use limits::Limits;
pub use members::{Member, MemberContent, members};
pub use restore::{ModeBits, RestoredLayer, restore_layer};
pub use tar::member_header;
