//! Who the process is: a user's specification resolved against the image's passwd and group files. Pure, except for reading them.

use std::{fs, io::Read, os::unix::fs::OpenOptionsExt};

use caisson_agent_api::v1;

use super::{At, StageError};
use crate::stage_spec::Identity;

/// Largest file that is read.
const MAX_FILE: u64 = 4 << 20;

/// The two files of an image. A missing one is empty.
#[derive(Debug, Default)]
pub(crate) struct Database {
    passwd: String,
    group: String,
}

impl Database {
    /// Reads the files below `root`, which has to be the root already, so that links stay inside.
    pub(super) fn read(root: &str) -> Result<Self, StageError> {
        Ok(Self {
            passwd: read(&format!("{root}etc/passwd"))?,
            group: read(&format!("{root}etc/group"))?,
        })
    }

    #[cfg(test)]
    fn new(passwd: &str, group: &str) -> Self {
        Self {
            passwd: passwd.to_owned(),
            group: group.to_owned(),
        }
    }
}

fn read(path: &str) -> Result<String, StageError> {
    // NONBLOCK: an image can have a fifo here.
    let file = fs::File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    let file = match file {
        Ok(file) => file,
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(String::new());
        }
        Err(error) => return Err(error).at(|| format!("opening {path}")),
    };
    if !file.metadata().at(|| format!("looking at {path}"))?.is_file() {
        return Ok(String::new());
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE)
        .read_to_end(&mut bytes)
        .at(|| format!("reading {path}"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

struct User<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn users(passwd: &str) -> impl Iterator<Item = User<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or_default();
        Some(User { name, uid, gid, home })
    })
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn groups(group: &str) -> impl Iterator<Item = Group<'_>> {
    group.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = fields.nth(1)?.parse().ok()?;
        let members = fields.next().unwrap_or_default();
        Some(Group { name, gid, members })
    })
}

/// Resolves `user`. A number needs no entry; a name does.
pub(crate) fn resolve(user: &v1::User, database: &Database) -> Result<Identity, StageError> {
    let (who, which) = match user.spec.split_once(':') {
        Some((who, which)) => (who, Some(which).filter(|which| !which.is_empty())),
        None => (user.spec.as_str(), None),
    };
    let who = if who.is_empty() { "0" } else { who };
    let number: Option<u32> = who.parse().ok();
    let entry = users(&database.passwd).find(|entry| entry.name == who || Some(entry.uid) == number);
    let (name, uid, mut gid, home) = match (&entry, number) {
        (Some(entry), _) => (entry.name, entry.uid, entry.gid, entry.home),
        (None, Some(uid)) => ("", uid, 0, ""),
        (None, None) => {
            return Err(StageError::Unknown {
                kind: "user",
                name: who.to_owned(),
                file: "passwd",
            });
        }
    };
    if let Some(which) = which {
        gid = resolve_group(which, &database.group)?;
    }
    if let Some(over) = user.gid {
        gid = over;
    }
    let mut supplemental = vec![gid];
    let mut add = |gid: u32| {
        if !supplemental.contains(&gid) {
            supplemental.push(gid);
        }
    };
    user.additional_gids.iter().copied().for_each(&mut add);
    if !user.strict_supplemental_groups && !name.is_empty() {
        groups(&database.group)
            .filter(|group| group.members.split(',').any(|member| member.trim() == name))
            .for_each(|group| add(group.gid));
    }
    Ok(Identity {
        uid,
        gid,
        groups: supplemental,
        home: home.to_owned(),
    })
}

fn resolve_group(which: &str, group: &str) -> Result<u32, StageError> {
    let number: Option<u32> = which.parse().ok();
    let entry = groups(group).find(|entry| entry.name == which || Some(entry.gid) == number);
    entry
        .map(|entry| entry.gid)
        .or(number)
        .ok_or_else(|| StageError::Unknown {
            kind: "group",
            name: which.to_owned(),
            file: "group",
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database() -> Database {
        Database::new(
            "root:x:0:0:root:/root:/bin/sh\n# comment\nbroken\nwww-data:x:33:33:www:/var/www:/bin/false\n1234:x:99:98::/n:\n",
            "root:x:0:\nwww-data:x:33:\nadm:x:4:www-data,other\ntape:x:26:other,www-data\nnogroup:x:65534:\n",
        )
    }

    fn who(spec: &str) -> Result<Identity, StageError> {
        let user = v1::User {
            spec: spec.to_owned(),
            ..v1::User::default()
        };
        resolve(&user, &database())
    }

    fn identity(uid: u32, gid: u32, groups: &[u32], home: &str) -> Identity {
        Identity {
            uid,
            gid,
            groups: groups.to_vec(),
            home: home.to_owned(),
        }
    }

    #[test]
    fn nobody_named_is_root() {
        assert_eq!(who("").unwrap(), identity(0, 0, &[0], "/root"));
    }

    #[test]
    fn a_name_brings_its_group_home_and_memberships() {
        assert_eq!(
            who("www-data").unwrap(),
            identity(33, 33, &[33, 4, 26], "/var/www")
        );
        assert_eq!(who("33").unwrap(), identity(33, 33, &[33, 4, 26], "/var/www"));
    }

    #[test]
    fn a_number_without_an_entry_is_itself_with_group_zero() {
        assert_eq!(who("1000").unwrap(), identity(1000, 0, &[0], ""));
        assert_eq!(who("1000:100").unwrap(), identity(1000, 100, &[100], ""));
        assert_eq!(who("1000:nogroup").unwrap(), identity(1000, 65534, &[65534], ""));
    }

    #[test]
    fn a_name_that_looks_like_a_number_is_a_name_first() {
        assert_eq!(who("1234").unwrap().uid, 99);
    }

    #[test]
    fn unknown_names_get_the_words_users_know() {
        assert_eq!(
            who("foo").unwrap_err().to_string(),
            "unable to find user foo: no matching entries in passwd file"
        );
        assert_eq!(
            who("root:foo").unwrap_err().to_string(),
            "unable to find group foo: no matching entries in group file"
        );
    }

    #[test]
    fn strict_groups_leave_the_image_out_and_an_override_wins() {
        let user = v1::User {
            spec: "www-data".to_owned(),
            gid: Some(7),
            additional_gids: vec![8, 7, 9],
            strict_supplemental_groups: true,
        };
        assert_eq!(
            resolve(&user, &database()).unwrap(),
            identity(33, 7, &[7, 8, 9], "/var/www")
        );
    }

    #[test]
    fn a_number_over_32_bits_is_an_unknown_name() {
        assert!(who("4294967296").is_err());
    }

    proptest::proptest! {
        #[test]
        fn whatever_an_image_has_in_its_files_nothing_panics(passwd: String, group: String, spec: String) {
            let user = v1::User { spec, ..v1::User::default() };
            let _ignored = resolve(&user, &Database { passwd, group });
        }
    }
}
