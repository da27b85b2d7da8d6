"""Holds the errors that several modules raise of arguments."""


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


def check_transformation(name: str, given: object, hint: str = "") -> None:
    """Raises where an argument is no transformation.

    Args:
      name: of the argument.
      given: what it is.
      hint: a sentence to add to the message.

    Raises:
      TypeError: it is not an Optax transformation.
    """
    if not all(callable(getattr(given, method, None)) for method in ("init", "update")):
        raise TypeError(
            f"{name} must be an Optax transformation such as optax.scale_by_adam(); got {given!r}"
            + (hint and f". {hint}")
        )
