"""Means and standard deviations by channel of well-known training sets, for pictures in [0, 1]."""

cifar_stats = ([0.491, 0.482, 0.447], [0.247, 0.243, 0.261])
cifar100_stats = ([0.507, 0.487, 0.441], [0.267, 0.256, 0.276])
imagenet_stats = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # torchvision's models expect these
mnist_stats = ([0.1307], [0.3081])
fashion_stats = ([0.2860], [0.3530])
