"""Noise against closed-form transition matrices, a slow reference and published label maps."""

import numpy as np
import pytest
from expected import refused

from ptglab.data import noise

N = 20_000

# https://www.cs.toronto.edu/~kriz/cifar.html, the 20 superclasses
SUPERCLASSES = """
beaver dolphin otter seal whale
aquarium_fish flatfish ray shark trout
orchid poppy rose sunflower tulip
bottle bowl can cup plate
apple mushroom orange pear sweet_pepper
clock keyboard lamp telephone television
bed chair couch table wardrobe
bee beetle butterfly caterpillar cockroach
bear leopard lion tiger wolf
bridge castle house road skyscraper
cloud forest mountain plain sea
camel cattle chimpanzee elephant kangaroo
fox porcupine possum raccoon skunk
crab lobster snail spider worm
baby boy girl man woman
crocodile dinosaur lizard snake turtle
hamster mouse rabbit shrew squirrel
maple_tree oak_tree palm_tree pine_tree willow_tree
bicycle bus motorcycle pickup_truck train
lawn_mower rocket streetcar tank tractor
"""
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def uniform(k, rate, include_self):
    t = np.zeros((k, k))
    for i in range(k):
        for j in range(k):
            own = (1 - rate) * (i == j)
            t[i, j] = own + rate / k if include_self else own or (i != j) * rate / (k - 1)
    return t


def flips(k, rate, targets):
    t = np.zeros((k, k))
    for i in range(k):
        t[i, i] = 1
        if i in targets:
            t[i, i], t[i, targets[i]] = 1 - rate, rate
    return t


GIVEN = np.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.1, 0.2, 0.7]])
PATRINI = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
CASES = {  # name: kind, rate, number of classes, options, closed form
    "uniform": ("uniform", 0.4, 10, {}, uniform(10, 0.4, False)),
    "uniform all": ("uniform", 1.0, 4, {}, uniform(4, 1.0, False)),
    "uniform with self": ("uniform", 0.5, 10, {"include_self": True}, uniform(10, 0.5, True)),
    "cifar10": ("asymmetric", 0.4, 10, {"mapping": "cifar10"},
                flips(10, 0.4, {CIFAR10.index(a): CIFAR10.index(b) for a, b in PATRINI.items()})),
    "digits": ("asymmetric", 0.3, 10, {"mapping": "digits"}, flips(10, 0.3, {2: 7, 3: 8, 5: 6, 6: 5, 7: 1})),
    "own mapping": ("asymmetric", 0.3, 3, {"mapping": {2: 0}}, flips(3, 0.3, {2: 0})),
    "unnamed": ("asymmetric", 0.3, 3, {"mapping": "my flowers"}, flips(3, 0.3, {0: 1, 1: 2, 2: 0})),
    "pair flip": ("pair_flip", 0.45, 4, {}, flips(4, 0.45, {0: 1, 1: 2, 2: 3, 3: 0})),
    "transition": ("transition", 0.0, 3, {"matrix": GIVEN}, GIVEN),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_labels_follow_the_closed_form(case):
    kind, rate, k, options, expected = CASES[case]
    t = noise.transition_matrix(kind, rate, k, **options)
    np.testing.assert_allclose(t, expected, atol=1e-15)
    np.testing.assert_allclose(t.sum(1), 1)
    labels = np.arange(N) % k
    given = noise.apply(kind, labels, rate, k, seed=3, **options)
    assert given.dtype == np.int64 and given.shape == (N,)
    share = np.array([[(given[labels == i] == j).mean() for j in range(k)] for i in range(k)])
    deviation = np.sqrt(expected * (1 - expected) / (N // k))
    assert (abs(share - expected) <= 5 * deviation).all()  # exactly equal where the closed form is 0 or 1
    np.testing.assert_allclose(noise.empirical_transition(labels, given, k), share, atol=1e-12)


@pytest.mark.parametrize(("include_self", "share"), [(False, 0.5), (True, 0.5 * 9 / 10)])
def test_the_effective_rate_of_uniform_noise(include_self, share):
    labels = np.arange(N) % 10
    given = noise.apply("uniform", labels, 0.5, 10, seed=0, include_self=include_self)
    assert abs(noise.effective_rate(labels, given) - share) < 5 * np.sqrt(share * (1 - share) / N)
    assert noise.effective_rate(labels, given) == sum(a != b for a, b in zip(labels, given, strict=True)) / N


def test_cifar100_goes_to_the_next_class_of_its_superclass():
    names = sorted(SUPERCLASSES.split())
    expected = {}
    for line in SUPERCLASSES.split("\n")[1:-1]:
        group = [names.index(name) for name in line.split()]  # alphabetical within the line, as the classes are
        expected |= {group[i]: group[(i + 1) % 5] for i in range(5)}
    assert len(expected) == 100 and expected[47] == 52 and expected[96] == 47  # maple > oak, willow > maple
    np.testing.assert_allclose(
        noise.transition_matrix("asymmetric", 0.4, 100, mapping="cifar100"), flips(100, 0.4, expected)
    )


def pictures(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 1, 4, 4), np.uint8)


OPTIONS = {
    "uniform": {},
    "asymmetric": {"mapping": "digits"},
    "pair_flip": {},
    "transition": {"matrix": uniform(10, 0.4, False)},
    "instance": {"images": pictures(500)},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_seed_alone_decides(kind):
    labels = np.arange(500) % 10
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the global generator is neither read nor moved
    first = noise.apply(kind, labels, 0.4, 10, seed=1, **OPTIONS[kind])
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    again = noise.apply(kind, labels, 0.4, 10, seed=1, **OPTIONS[kind])
    other = noise.apply(kind, labels, 0.4, 10, seed=2, **OPTIONS[kind])
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(labels, np.arange(500) % 10)


def slow_instance(labels, rate, k, images, seed):
    """Algorithm 2 of arXiv 2006.07836, row by row, with the draws in the same order."""
    rng = np.random.default_rng(seed)
    pixels = images.reshape(len(labels), -1).astype(np.float32)
    pixels = (pixels - pixels.mean()) / (pixels.std() + 1e-6)
    rates = [rng.normal(rate, 0.1) for _ in labels]
    while any(not 0 <= q <= 1 for q in rates):
        rates = [q if 0 <= q <= 1 else rng.normal(rate, 0.1) for q in rates]
    projections = [rng.standard_normal((pixels.shape[1], k), np.float32) for _ in range(k)]
    given = []
    for x, y, q in zip(pixels, labels, rates, strict=True):
        weights = {j: float(x.astype(float) @ projections[y][:, j].astype(float)) for j in range(k) if j != y}
        weights = {j: np.exp(w - max(weights.values())) for j, w in weights.items()}
        p = [1 - q if j == y else q * weights[j] / sum(weights.values()) for j in range(k)]
        u = rng.random()
        given.append(next(j for j in range(k) if u < sum(p[: j + 1])))
    return given


@pytest.mark.parametrize("rate", [0.05, 0.4, 0.95])
def test_instance_noise_equals_the_slow_reference(rate):
    labels, images = np.random.default_rng(0).integers(0, 5, 400), pictures(400)
    given = noise.apply("instance", labels, rate, 5, seed=7, images=images)
    assert given.tolist() == slow_instance(labels, rate, 5, images, 7)


def test_instance_noise_looks_at_the_image():
    """Copies of one image are mistaken for the same classes, another image of the same class for others."""
    a_or_b = np.arange(N) % 2
    given = noise.apply("instance", np.zeros(N, int), 0.5, 6, seed=1, images=pictures(2)[a_or_b])

    def targets(rows):
        wrong = given[rows][given[rows] > 0]
        return np.bincount(wrong, minlength=6) / len(wrong), len(wrong)

    half = np.arange(N) < N // 2
    (a, n), (a_again, m), (b, _) = targets(half & (a_or_b == 0)), targets(~half & (a_or_b == 0)), targets(a_or_b == 1)
    assert (abs(a - a_again) <= 5 * np.sqrt(a * (1 - a) * (1 / n + 1 / m)) + 1e-3).all()
    assert abs(a - b).sum() > 0.2


def test_human_noise_is_the_column_itself():
    human = np.array([1, 0, 2, 2])
    given = noise.apply("human", np.array([0, 0, 2, 1]), 0.9, 3, seed=0, human=human)
    np.testing.assert_array_equal(given, human)
    given[0] = 7
    assert human[0] == 1


@pytest.mark.parametrize(("kind", "rate"), [("none", 0.4), ("uniform", 0.0), ("pair_flip", 0.0)])
def test_no_noise_changes_nothing(kind, rate):
    labels = np.arange(300) % 10
    given = noise.apply(kind, labels, rate, 10, seed=0)
    np.testing.assert_array_equal(given, labels)
    assert given is not labels


def test_empirical_transition_of_an_absent_class_is_nan():
    t = noise.empirical_transition(np.array([0, 0, 2, 2]), np.array([0, 1, 2, 2]), 3)
    np.testing.assert_array_equal(t, [[0.5, 0.5, 0], [np.nan] * 3, [0, 0, 1]])


LABELS = np.array([0, 1, 2, 0])
BAD = [
    (("uniform", LABELS, 1.2, 3), {}, "noise_rate is 1.2"),
    (("uniform", LABELS, -0.1, 3), {}, "noise_rate is -0.1"),
    (("uniform", LABELS, float("nan"), 3), {}, "noise_rate is nan"),
    (("unifrom", LABELS, 0.2, 3), {}, "unknown noise 'unifrom': did you mean 'uniform'?"),
    (("uniform", LABELS, 0.2, 2), {}, "row 2 has the label 2; labels run from 0 to 1"),
    (("none", np.array([0, 1, 1, -1]), 0.2, 2), {}, "row 3 has the label -1"),
    (("transition", LABELS, 0.2, 3), {}, "needs a matrix of 3 x 3"),
    (("transition", LABELS, 0.2, 3), {"matrix": np.eye(2)}, "needs a matrix of 3 x 3"),
    (("transition", LABELS, 0.2, 3), {"matrix": np.full((3, 3), 0.3)}, "sum to 1"),
    (("transition", LABELS, 0.2, 3), {"matrix": np.eye(3) * 2 - np.roll(np.eye(3), 1, 1)}, "probabilities"),
    (("human", LABELS, 0.2, 3), {}, "name it with the parameter `labels`"),
    (("human", LABELS, 0.2, 3), {"human": LABELS[:3]}, "label column"),
    (("human", LABELS, 0.2, 3), {"human": LABELS + 1}, "row 2 has the label 3"),
    (("instance", LABELS, 0.2, 3), {}, "needs the images"),
    (("instance", LABELS, 0.2, 3), {"images": pictures(3)}, "one a label"),
    (("asymmetric", LABELS, 0.2, 3), {"mapping": {0: 3}}, "the mapping 0 > 3 leaves"),
    (("asymmetric", LABELS, 0.2, 3), {"mapping": {-1: 0}}, "the mapping -1 > 0 leaves"),
    (("asymmetric", LABELS, 0.2, 3), {"mapping": "cifar10"}, "leaves the classes 0 to 2"),
    (("uniform", LABELS * 0, 0.2, 1), {}, "only one class"),
    (("instance", LABELS * 0, 0.2, 1), {"images": pictures(4)}, "only one class"),
]


@pytest.mark.parametrize(("arguments", "options", "words"), BAD)
def test_bad_input_is_refused_in_one_line(arguments, options, words):
    refused(words, call=noise.apply)(*arguments, seed=0, **options)


@pytest.mark.parametrize("kind", ["uniform", "pair_flip", "asymmetric"])
def test_one_class_has_no_transitions_but_its_own(kind):
    refused("only one class", call=noise.transition_matrix)(kind, 0.2, 1)
    assert not noise.apply("transition", LABELS * 0, 0.2, 1, seed=0, matrix=np.eye(1)).any()
