"""The learnt policy: a graph neural network over a run's layers, seeds and kernels.

``inputs`` reads views into arrays, ``batch`` lays them side by side, ``network`` scores choices,
``policy`` acts, ``checkpoint`` keeps weights and card, ``pooling`` finds the fastest scatter.
"""
