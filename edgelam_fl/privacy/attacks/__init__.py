"""What an honest but curious participant reads or learns from what it receives. Each attack is a function of tensors.

No attack knows a model, a run or a network: it gets hidden states, gradients or updates, and what is public beside them. An
attack that needs the public model gets it as callables.
"""
