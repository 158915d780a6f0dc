"""The one exception class for mistakes a user can mend; every message says what was wrong and what to do."""


class MfpError(ValueError):
    """A wrong argument, file or model. Nothing was changed when it is raised."""


class CaptureError(MfpError):
    """A model that torch.export cannot follow, or that does not run on the example."""
