"""Commands about Tamiyo's policies: training data, training, evaluation, comparison and versions."""
