"""Means and standard deviations by channel of well-known training sets, of pictures in [0, 1]."""

cifar_stats = ([.491, .482, .447], [.247, .243, .261])
cifar100_stats = ([.507, .487, .441], [.267, .256, .276])
imagenet_stats = ([.485, .456, .406], [.229, .224, .225])       # torchvision's models expect these
mnist_stats = ([.1307], [.3081])
fashion_stats = ([.2860], [.3530])
