"""Updates the weights inside the backward pass, one layer at a time.

`api` has the function that users call, `settings` its arguments, and `step` what it returns.
`division` says which leaves of the parameters and of the state are updated at a time, and `checks`
whether a transformation can be divided so. A `sweep` goes forward through the model and back:
`passes` has the gradients that it takes, and `updating` what becomes of them. `places` says where
all of it lies, `offload` what of it in the memory of the machine, and `spaces` moves it there.
"""

from galore_optax._layerwise.api import Layerwise, layerwise
from galore_optax._layerwise.places import layerwise_shardings

__all__ = ["Layerwise", "layerwise", "layerwise_shardings"]
