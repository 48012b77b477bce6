"""Errors that are the user's to mend; the tools print them without a traceback."""


class ConfigError(ValueError):
    """A config, or an option laid over it, that cannot work; the message names the field."""


class DataError(RuntimeError):
    """Data that is missing, broken or does not fit the model; the message names the file or folder."""
