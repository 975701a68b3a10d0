"""From a dataset to the batches of a step: loaders, the order of samples, the random numbers of each, and the forms of
a batch.
"""
