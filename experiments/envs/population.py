"""Who the users are: eight hidden numbers each, a function of an integer id, for a million ids.

Nothing is stored: a user is Philox(key=(seed, id)). Users come in clusters, whose means walk at
random from epoch to epoch; the last clusters appear in one split only. Visits follow a Zipf law
over users who return, mixed with uniformly drawn ones.
"""

from dataclasses import dataclass

import numpy as np

from experiments.envs.philox import normal, philox, uniform, words

SIZE = 8  # numbers of a user
SPLITS = {  # ids
    "train": range(0, 900_000),
    "users": range(900_000, 950_000),  # held-out users of the clusters seen in training
    "clusters": range(950_000, 1_000_000),  # users of held-out clusters
}
USERS = 1_000_000

ZIPF = 1.1  # exponent of the popularity of returning users
FRESH = 0.5  # share of visits by users drawn uniformly
EPISODES = 5  # most episodes of a visit

# Streams of random numbers: what each is used for.
_USER, _CLUSTER, _VISIT, _ZIPF = range(4)


@dataclass(frozen=True)
class Population:
    """A mixture of clusters of users in R^8, drifting with the epoch.

    Cluster means are N(0, between^2) and take a step of N(0, drift^2) each epoch; a user deviates
    from its cluster's mean by N(0, within^2), one deviation a coordinate or one for all.
    """

    seed: int = 0
    clusters: int = 16
    held: int = 4  # of these clusters, those that only the split "clusters" holds
    between: float = 0.9
    within: float | tuple[float, ...] = 0.4
    drift: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.held < self.clusters:
            raise ValueError(f"held={self.held} of clusters={self.clusters}: fewer must be held")

    def means(self, epoch: int = 0) -> np.ndarray:
        """Means (clusters, 8) of the clusters at an epoch, 0 or later."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: epochs count from 0")
        numbers = np.arange(self.clusters)
        means = self.between * normal(words(self.seed, numbers, SIZE, _CLUSTER)).T
        cluster, step = np.meshgrid(numbers, np.arange(1, epoch + 1), indexing="ij")
        blocks = [
            philox(self.seed, cluster.ravel(), 2 * step.ravel() + i, _CLUSTER) for i in (1, 2)
        ]
        steps = normal(np.concatenate(blocks)).reshape(SIZE, self.clusters, epoch)
        return means + self.drift * steps.sum(2).T

    def cluster(self, ids: np.ndarray) -> np.ndarray:
        """Numbers (n,) of the clusters that users (n,) belong to."""
        return self._cluster(ids, words(self.seed, ids, SIZE + 1, _USER)[SIZE])

    def contexts(self, ids: np.ndarray, epoch: int = 0) -> np.ndarray:
        """The hidden numbers (n, 8) float64 of users (n,) at an epoch."""
        ids = checked(ids)
        bits = words(self.seed, ids, SIZE + 1, _USER)
        deviations = normal(bits[:SIZE]).T * np.asarray(self.within)
        return self.means(epoch)[self._cluster(ids, bits[SIZE])] + deviations

    def _cluster(self, ids: np.ndarray, bits: np.ndarray) -> np.ndarray:
        seen, share = self.clusters - self.held, uniform(bits)
        held = np.asarray(ids) >= SPLITS["clusters"].start
        return np.where(
            held & (self.held > 0), seen + (share * self.held).astype(int), share * seen
        ).astype(np.int64)


def checked(ids: np.ndarray) -> np.ndarray:
    """Ids (n,) as int64. Raises ValueError unless all are whole numbers in [0, 1000000)."""
    given = np.atleast_1d(ids)
    if given.dtype.kind not in "iu" or given.ndim != 1:
        raise ValueError(f"user ids are a row of whole numbers, got {given.dtype} {given.shape}")
    if given.size and not 0 <= given.min() <= given.max() < USERS:
        raise ValueError(f"user ids {given.min()} to {given.max()} leave [0, {USERS})")
    return given.astype(np.int64)


def visitors(
    seed: int, slots: np.ndarray, visits: np.ndarray, splits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Who sits down: ids (n,) and the episodes (n,) of their visit, 1 to 5.

    A function of the seed, the slot, the number of the slot's visit and the split (by its number in
    SPLITS), all (n,). In each split, the lower an id the more often that user returns.
    """
    bounds = np.array([(ids.start, len(ids)) for ids in SPLITS.values()])
    start, count = bounds[splits].T
    kind, which, episodes, _ = uniform(philox(seed, slots, visits, _VISIT))
    fresh = (which * count).astype(np.int64)
    back = zipf(seed, slots, visits, count) - 1
    ids = start + np.where(kind < FRESH, fresh, back)
    return ids, 1 + (episodes * EPISODES).astype(np.int64)


def zipf(seed: int, slots: np.ndarray, visits: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Ranks (n,) in 1..count, rank k with weight k**-ZIPF; all arguments but the seed (n,).

    Rejection-inversion (Hoermann & Derflinger 1996): exact, and no table of the weights.
    """
    ranks = np.zeros(len(slots), np.int64)
    pending, attempt = np.arange(len(slots)), 0
    low, slack = _area(np.array(1.5)) - 1.0, 2.0 - _inverse(_area(np.array(2.5)) - 2.0**-ZIPF)
    while len(pending):
        keys = visits[pending].astype(np.uint64) << np.uint64(16) | np.uint64(attempt)
        share = uniform(philox(seed, slots[pending], keys, _ZIPF)[0])
        high = _area(count[pending] + 0.5)
        area = high + share * (low - high)
        place = _inverse(area)
        rank = np.clip(np.rint(place), 1, count[pending])
        taken = (rank - place <= slack) | (area >= _area(rank + 0.5) - rank**-ZIPF)
        ranks[pending[taken]] = rank[taken]
        pending, attempt = pending[~taken], attempt + 1
    return ranks


def _area(x: np.ndarray) -> np.ndarray:
    """The integral of x**-ZIPF from 1."""
    return np.expm1((1.0 - ZIPF) * np.log(x)) / (1.0 - ZIPF)


def _inverse(area: np.ndarray) -> np.ndarray:
    return np.exp(np.log1p((1.0 - ZIPF) * area) / (1.0 - ZIPF))
