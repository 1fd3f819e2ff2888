"""Limits on what a file may ask for (size, depth, time, finiteness, place), and why each is so.

What is read from a file that somebody else wrote is held against these before it is used. Each is
far above what real files need and far below what stops a machine.
"""

# Pictures and videos

# Pillow tells a format by content, whatever a file is called, and has plug-ins for some forty: one
# starts a program (EPS: Ghostscript, which has had escapes from its sandbox), others are old, rare
# and little tested. These are what cameras, phones, browsers and scanners write. HEIF is added
# where pillow-heif is installed.
IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# FFmpeg's demuxers likewise: containers and plain streams. Playlists (hls, dash, concat, sdp, image
# sequences) open what they name, other files and addresses.
VIDEO_FORMATS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "mxf", "ivf"),
    *("h264", "hevc", "m4v", "mjpeg", "dv"),
)
# Twice Pillow's Image.MAX_IMAGE_PIXELS, above which Pillow itself refuses: 13,377 pixels squared.
# The default of data.max_image_pixels. (A text chunk of a PNG may have 1 MiB, all of them 64, by
# Pillow's own limits.)
MAX_IMAGE_PIXELS = 178_956_970
# Frames of an animation come one after another, each drawn upon the last: 17 minutes at 10 a
# second, and in pixels 8,000 frames of 1920 x 1080, a few minutes of decoding.
MAX_ANIMATION_FRAMES = 10_000
MAX_ANIMATION_PIXELS = 2**34
MAX_VIDEO_FRAMES = 10_000_000  # 92 hours at 30 a second
FETCH_SECONDS = 30  # without a byte of an address's answer
FETCH_BYTES = 256 * 2**20
# Chat templates: a checkpoint's own code, kept from files by its sandbox but not from the clock.
TEMPLATE_SOURCE = 2**20  # characters; the longest in use (tools, thoughts, media) have 30,000
TEMPLATE_SECONDS = 5.0  # for one rendering; a conversation of 10,000 turns takes a tenth of one
TEMPLATE_CHARACTERS = 64 * 2**20  # of a text on its way, a prompt of 64 MB is none
TEMPLATE_NUMBER = 2**20  # an argument (a width, a count), and the bits of a number that is computed

# CSV and TSV: a quote that nothing closes would make one row of all that follows.
CSV_ROW_BYTES = 64 * 2**20  # a row may hold a picture in base64
