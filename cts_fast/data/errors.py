"""What goes wrong with data, in one message that names file, reason and remedy."""


class DamagedFile(RuntimeError):
    """Data do not hold what they should: a file, a member of the suite's file, a count, a checksum, an image."""


class MissingData(FileNotFoundError):
    """A data set is not there; the message says where it was looked for and how to get it."""
