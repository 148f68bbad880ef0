"""Commands about Tamiyo's policies: versions, replay, evaluation, comparison, publication."""
