"""NVILA's tiling: a large picture is shown to the vision tower as several tiles of the tower's own size."""

from PIL import Image


def tile_grid(width: int, height: int, tile: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """The grid of `min_tiles` to `max_tiles` tiles, `(columns, rows)`, whose aspect ratio is nearest to the picture's.

    Candidates are tried by their number of tiles; of two that are equally near, the larger one wins if the picture has
    more than half of its pixels. (Two with the same number of tiles are tried from the one with fewer columns on.)

    Args:
        width, height: of the picture, pixels.
        tile: side of a tile, pixels.

    Raises: `ValueError` if there is no grid between the bounds.
    """
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(
            f"no grid has {min_tiles} to {max_tiles} tiles: raise max_tiles to {max(min_tiles, 1)} or more (the last of "
            "s2_scales needs the square of its multiple of the first)"
        )
    grids = [
        (columns, count // columns)
        for count in range(min_tiles, max_tiles + 1)
        for columns in range(1, count + 1)
        if count % columns == 0
    ]
    best, best_distance = grids[0], float("inf")
    for columns, rows in grids:
        distance = abs(width / height - columns / rows)
        is_nearer = distance < best_distance
        if is_nearer or (distance == best_distance and width * height > 0.5 * tile * tile * columns * rows):
            best, best_distance = (columns, rows), distance
    return best


def cut_tiles(picture: Image.Image, columns: int, rows: int, tile: int, resample: int) -> list[Image.Image]:
    """Resize to `columns * tile` x `rows * tile` pixels, whatever the aspect ratio is, and cut tiles row by row."""
    picture = picture.resize((columns * tile, rows * tile), resample)
    return [
        picture.crop((column * tile, row * tile, (column + 1) * tile, (row + 1) * tile))
        for row in range(rows)
        for column in range(columns)
    ]


def dynamic_tiles(
    picture: Image.Image, tile: int, min_tiles: int, max_tiles: int, resample: int
) -> tuple[list[Image.Image], tuple[int, int]]:
    """NVILA's `dynamic`: the tiles of the nearest grid, and behind several of them the whole picture as one more.

    Returns: the tiles, and the grid `(rows, columns)` without the one of the whole picture.
    """
    columns, rows = tile_grid(*picture.size, tile, min_tiles, max_tiles)
    tiles = cut_tiles(picture, columns, rows, tile, resample)
    if len(tiles) > 1:
        tiles.append(picture.resize((tile, tile), resample))
    return tiles, (rows, columns)


def scale_grids(scales: list[int], rows: int, columns: int) -> list[tuple[int, int]]:
    """`(rows, columns)` of the tiles of each scale: squares, but for the last, whose grid is given."""
    return [(scale // scales[0],) * 2 for scale in scales[:-1]] + [(rows, columns)]


def multi_scale_grid(width: int, height: int, scales: list[int], max_tiles: int) -> tuple[int, int]:
    """`(rows, columns)` of the last scale: the nearest grid of at least as many tiles as a square of its size has."""
    columns, rows = tile_grid(width, height, scales[0], (scales[-1] // scales[0]) ** 2, max_tiles)
    return rows, columns


def multi_scale_tiles(
    picture: Image.Image, scales: list[int], max_tiles: int, resample: int
) -> tuple[list[Image.Image], tuple[int, int]]:
    """NVILA's `dynamic_s2`: the picture at every scale, each cut into tiles of the first one's size.

    Returns: the tiles, scale by scale; and the grid of the last scale, `(rows, columns)`.
    """
    grid = multi_scale_grid(*picture.size, scales, max_tiles)
    tiles = [
        tile
        for rows, columns in scale_grids(scales, *grid)
        for tile in cut_tiles(picture, columns, rows, scales[0], resample)
    ]
    return tiles, grid


__all__ = ["cut_tiles", "dynamic_tiles", "multi_scale_grid", "multi_scale_tiles", "scale_grids", "tile_grid"]
