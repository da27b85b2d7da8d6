"""Updates the weights inside the backward pass, one layer at a time.

`api` has the function that users call, `settings` its arguments, and `step` what it returns.
`division` says which leaves of the parameters and of the state are updated at a time, and `checks`
whether a transformation can be divided so. A `sweep` goes forward through the model and back:
`passes` has the gradients that it takes, and `updating` what becomes of them.
"""

from galore_optax._layerwise.api import Layerwise, layerwise

__all__ = ["Layerwise", "layerwise"]
