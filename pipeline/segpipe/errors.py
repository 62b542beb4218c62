"""What can go wrong that is not a bug.

    SegpipeError
    ├── SettingsError   wrong usage or settings; nothing was started      exit code 2
    ├── InputError      an input cannot be used; the others are finished  exit code 1
    │   └── BusyError   another process works on it
    ├── ModelError      a model file cannot be used                       exit code 2
    └── Stopped         the user or the scheduler asked to stop           exit code 130

Messages are one line: what, got, expected, what to do.
"""

from __future__ import annotations


class SegpipeError(Exception):
    """Base of every error that is shown to the user as one line, without a traceback."""

    exit_code = 2


class SettingsError(SegpipeError, ValueError):
    """A setting, an option or a combination of them is wrong; nothing was started."""


class InputError(SegpipeError, OSError):
    """An image cannot be read, or is not an image that segpipe can use."""

    exit_code = 1


class BusyError(InputError):
    """Another process works on this image."""


class ModelError(SegpipeError, ValueError):
    """A model file cannot be read, or does not fit the image."""


class Stopped(SegpipeError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and left a state that resumes."""

    exit_code = 130
