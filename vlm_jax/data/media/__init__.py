"""Images and videos: from files to the pixels of patches."""
