"""Published findings on preference training, run again in small: one file each, `all` writes docs/reproductions.md."""
