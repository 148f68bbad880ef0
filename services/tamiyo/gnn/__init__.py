"""The learned policy: a graph neural network over the layers, seeds and kernels of a run.

``view_arrays`` turns views into arrays, ``graph_batch`` combines them, ``network`` scores choices, ``gnn_policy`` makes
them a policy, ``network_trainer`` and ``policy_fit`` train it, ``policy_file`` stores weights and card, ``pooling``
chooses the fastest scatter.
"""
