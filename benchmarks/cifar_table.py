"""A CIFAR-10 table that two cores can run: a slim PreActResNet, eps 8/255, three epochs.

    python benchmarks/cifar_table.py --data DIR   # the folder with data_batch_1.bin and so on

It shows that training and judging run end to end on colour images with batch norm and
augmentation. Three epochs of a 0.3 M network say nothing about how the methods compare.
"""

from _table import Row, main

SMALL = {
    "model": "preactresnet10-slim",
    "normalize": True,
    "epochs": 3,
    "batch_size": 128,
    "lr": 0.1,
    "schedule": "onecycle",
}
ROWS = [Row(method, "cifar10", 0, SMALL) for method in ("sat-r2", "sat-r3", "fgsm")]

if __name__ == "__main__":
    main(ROWS, out="benchmarks/results/cifar10.csv", steps=20, n=1000)
