"""What really happens in a network, seen from its own modules and not from the gate's counters."""

from collections import Counter
from functools import partial

from tgate_processors._folding import batch_of
from tgate_processors._layers import attention_layers, cross_attention_layers


class Seen:
    """What reaches a network: the batch of every call, and the attention layers that compute."""

    def __init__(self, network):
        self.batches, self.computed = [], Counter()
        self.cross = cross_attention_layers(network)
        self.num_self = len(attention_layers(network)) - len(self.cross)
        self.hooks = [network.register_forward_pre_hook(self.on_call, with_kwargs=True)]
        for layer_name, layer in attention_layers(network).items():
            key = next((getattr(layer, part) for part in ("to_k", "to_key") if hasattr(layer, part)), None)
            kind = "cross" if layer_name in self.cross else "self"
            if key is not None:  # some make queries, keys and values at once
                self.hooks.append(key.register_forward_hook(partial(self.on_attention, kind)))

    def on_call(self, module, args, kwargs):
        self.batches.append(batch_of((args, kwargs)))

    def on_attention(self, kind, *_):
        self.computed[kind] += 1

    def stop(self):
        for hook in self.hooks:
            hook.remove()
