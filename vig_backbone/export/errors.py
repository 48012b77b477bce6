"""What can go wrong in an export and is the user's to mend."""


class ExportError(RuntimeError):
    """A model that cannot be exported as asked, or a package that this needs; the message says what to do."""
