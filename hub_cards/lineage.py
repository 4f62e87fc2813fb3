"""The license that weights inherit from the weights that they were made from, and a data set from its sources."""

PERMISSIVE = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0")
NON_COMMERCIAL = ("cc-by-nc-4.0", "cc-by-nc-sa-4.0")  # the later one asks for more and includes the earlier
# Every published checkpoint of these families is non-commercial: an origin of that name with another license is a slip.
NON_COMMERCIAL_FAMILIES = ("nvila", "4d-rgpt", "l4p")


def model_license(origins: list[dict]) -> str:
    """The Hub's license id for weights that descend from `origins`.

    Weights made from nothing but our own code are Apache-2.0. Whatever starts from non-commercial weights, or is
    distilled from them, stays non-commercial, under the strictest of their licenses. A teacher counts as an origin:
    whether a student inherits from it is not settled, and a card is not the place to decide that it does not.

    Args:
        origins (`list[dict]`): the weights used, each with `name` (str), `role` (`"initial weights"` or `"teacher"`)
            and `license` (the Hub's id); empty for a model trained from scratch without a foreign teacher.
    Returns: `"apache-2.0"` or one of `NON_COMMERCIAL`.
    Raises: `ValueError` for a license that this function does not know, or a permissive one on a family that is
        non-commercial; the message names the origin.
    """
    strictest = -1
    for origin in origins:
        name, license = origin["name"], origin["license"].lower()
        if license in NON_COMMERCIAL:
            strictest = max(strictest, NON_COMMERCIAL.index(license))
        elif license not in PERMISSIVE:
            known = ", ".join(PERMISSIVE + NON_COMMERCIAL)
            raise ValueError(f"{name}: what follows from the license {license!r} is not known here, only from {known}")
        elif any(family in name.lower() for family in NON_COMMERCIAL_FAMILIES):
            raise ValueError(f"{name} is non-commercial as published; its license cannot be {license!r}")
    return NON_COMMERCIAL[strictest] if strictest >= 0 else "apache-2.0"


def data_license(licenses: list[str]) -> str:
    """The Hub's license id for data put together from sources with these licenses: the strictest, or "other" if one of
    them is not known here (words such as "not established" are not).
    """
    licenses = [license.lower() for license in licenses]
    if not licenses or not {*licenses} <= {*PERMISSIVE, *NON_COMMERCIAL}:
        return "other"
    return max(licenses, key=(PERMISSIVE + NON_COMMERCIAL).index)
