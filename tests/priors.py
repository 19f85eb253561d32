"""The diagonal moments toward which others are shrunk, computed anew."""


def mixed(M, share, sizes):
    """A moment and the diagonal one in which every channel is worth the mean, of unequal sizes."""
    return (1 - share) * M + share * (M.diagonal() * sizes).mean() * (1 / sizes).diag()


def alike(W):
    """Sizes of rows and columns under which all have the same mean square, both at a time."""
    rows, columns = W.new_ones(len(W)), W.new_ones(W.shape[1])
    for _ in range(2000):
        scaled = W.square() / rows[:, None] / columns
        rows, columns = rows * scaled.mean(1).sqrt(), columns * scaled.mean(0).sqrt()
    return rows, columns
