"""Holds the error of arguments that cannot go together."""


class CombinationError(ValueError):
    """Arguments, each of them right by itself, cannot go together.

    Attributes:
      reason: why not.
      remedy: what to write instead, a sentence.
    """

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.reason}. {self.remedy}"
