//! Durability: a rank that is killed at any instant of a save or a load leaves whole steps, and a resume ends where the
//! run that nobody killed ends; a server that is killed has all that it has acknowledged; a flipped bit is found.

mod flips;
mod kills;
mod matrix;
mod saves;
mod server;
mod story;
