"""The accuracy table on MNIST: LeNet+, eps 0.3, 10,000 test images, PGD-100 on ce and margin.

    python benchmarks/mnist_table.py                           # all rows, two at a time
    python benchmarks/mnist_table.py --only sat-r2/mnist-fast  # some of them
    python benchmarks/mnist_table.py --table                   # means over seeds, of rows there are

Rows already in benchmarks/results/mnist.csv are skipped, so a stopped table continues where it was.
Every run has one core and one thread, so that seconds are comparable.
"""

from _table import Row, main

SINGLE_STEP = ("sat-r2", "sat-r3", "sat-r1", "fgsm")
ROWS = [
    # The longest run first.
    Row("pgd", "mnist-fast"),
    *(Row(method, "mnist") for method in ("sat-r2", "sat-r1", "sat-r3")),
    *(Row(method, "mnist-fast", seed) for seed in range(3) for method in SINGLE_STEP),
]

if __name__ == "__main__":
    main(ROWS, out="benchmarks/results/mnist.csv", steps=100, n=10_000)
