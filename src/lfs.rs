//! Pointers that git-LFS leaves in place of large files in a clone without it.

/// The remedy for a user.
pub const REMEDY: &str = "a git-LFS pointer in place of the file; run `git lfs pull` in its folder";

/// Returns true if `bytes` are the start of a pointer.
pub fn is_pointer(bytes: &[u8]) -> bool {
    bytes.starts_with(b"version https://git-lfs.github.com/spec/")
}
