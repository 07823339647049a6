"""How the names of files that hold images end."""

from __future__ import annotations

# What people keep images in. HEIF is among them: that it can't be read is said of each one.
SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".heic",
    ".heif",
    ".jfif",
    ".jp2",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tga",
    ".tif",
    ".tiff",
    ".webp",
)
