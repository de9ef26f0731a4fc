"""No key, token or password is in what git keeps; and the scan finds planted ones. It needs no network.

Known vulnerabilities of installed packages need a list that changes daily: `make audit-dependencies`, with a network.
"""

import math
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LARGEST = 5_000_000  # bytes of a file that is scanned
# The forms that their makers document; none of them is written out here, so that this file passes its own scan.
KINDS = {
    "a private key": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    "a key of PuTTY": r"PuTTY-User-Key-File-\d",
    "an AWS key": r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_\w{50,}\b",
    "a GitLab token": r"\bgl(?:pat|dt|rt)-[\w-]{20,}",
    "a Hugging Face token": r"\bhf_[A-Za-z]{34,}\b",
    "a Google key": r"\bAIza[\w-]{35}\b",
    "a Slack token": r"\bxox[abeoprs]-[\w-]{10,}",
    "a Stripe key": r"\b[rs]k_live_[A-Za-z0-9]{20,}\b",
    "an API key": r"\bsk-(?:[a-z]+-)?[\w-]{32,}",
    "an upload token": r"\bpypi-[\w-]{50,}|\bnpm_[A-Za-z0-9]{36}\b",
    "a JSON web token": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "a password in an address": r"\b[a-z][a-z0-9+.-]*://[^\s/:@'\"{}<>]+:[^\s/@'\"{}<>]{3,}@[\w.-]+",
}
# What is called a secret and set to a text that looks drawn at random.
NAMED = re.compile(
    r"(?i)(?:api_?key|secret|token|passw(?:or)?d|credential)\w*['\"]?\s*[:=]\s*['\"]([A-Za-z0-9+/=_.-]{16,})['\"]"
)


def bits(text: str) -> float:
    """Return the entropy of a text in bits a letter."""
    shares = [number / len(text) for number in Counter(text).values()]
    return -sum(share * math.log2(share) for share in shares)


def secrets(text: str) -> list[tuple[int, str]]:
    """Return (line, what it looks like) of every secret in `text`."""
    found = [(match.start(), kind) for kind, pattern in KINDS.items() for match in re.finditer(pattern, text)]
    found += [(match.start(), "a secret by name") for match in NAMED.finditer(text) if bits(match[1]) > 3.5]
    return [(text.count("\n", 0, start) + 1, kind) for start, kind in sorted(found)]


def kept() -> list[Path]:
    """Return the files git keeps; without git, those of the sources."""
    if (ROOT / ".git").exists():
        names = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True).stdout
        return [ROOT / name for name in names.decode().split("\0") if name and (ROOT / name).is_file()]
    inside = [path for name in ("ptglab", "notebooks", "tests", "figures") for path in (ROOT / name).rglob("*")]
    return [path for path in (*inside, *ROOT.glob("*")) if path.is_file() and "__pycache__" not in path.parts]


def test_nothing_that_git_keeps_holds_a_secret():
    files = kept()
    assert len(files) > 100
    texts = {path: path.read_bytes().decode("utf-8", "replace") for path in files if path.stat().st_size <= LARGEST}
    assert len(texts) == len(files), "a file is too large to scan"
    assert {str(path.relative_to(ROOT)): s for path, text in texts.items() if (s := secrets(text))} == {}


def test_no_file_of_secrets_is_kept():
    bad = re.compile(
        r"(?i)(^|/)(\.env(\..+)?|\.netrc|\.pypirc|\.htpasswd|id_(rsa|dsa|ecdsa|ed25519)|.+\.(pem|p12|pfx|key|kdbx))$"
    )
    assert [path for path in kept() if bad.search(path.as_posix())] == []


UPPER, LOWER, BOTH = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz", "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hJ6"
PLANTED = {
    "a private key": ["-----BEGIN " + "RSA PRIVATE KEY-----", "-----BEGIN " + "PRIVATE KEY-----",
                      "-----BEGIN " + "OPENSSH PRIVATE KEY-----", "-----BEGIN " + "PGP PRIVATE KEY BLOCK-----"],
    "a key of PuTTY": ["PuTTY-User-Key-" + "File-3: ssh-ed25519"],
    "an AWS key": ["AKIA" + UPPER[:16], "x = 'ASIA" + UPPER[5:21] + "'"],
    "a GitHub token": ["ghp_" + BOTH, "gho_" + BOTH, "github_" + "pat_" + BOTH + BOTH],
    "a GitLab token": ["glpat-" + BOTH[:20]],
    "a Hugging Face token": ["hf_" + (LOWER + UPPER)[:34]],
    "a Google key": ["AIza" + BOTH[:35]],
    "a Slack token": ["xoxb-" + BOTH[:20]],
    "a Stripe key": ["sk_" + "live_" + BOTH[:24]],
    "an API key": ["sk-" + BOTH, "sk-" + "proj-" + BOTH],
    "an upload token": ["pypi-" + BOTH + BOTH, "npm_" + BOTH[:36]],
    "a JSON web token": [f"eyJ{BOTH}.eyJ{BOTH}.{BOTH}"],
    "a password in an address": ["https://me:" + "hunter22@example.org/x", "postgresql://a:" + "b1c2d3@host/db"],
    "a secret by name": ["api_key = '" + BOTH + "'", '"password": "' + BOTH[:20] + '"', "TOKEN='" + BOTH[7:30] + "'"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in PLANTED.items() for text in texts])
def test_a_planted_secret_is_found(kind, text):
    assert (3, kind) in secrets(f"first\n\n{text}\nlast")


def test_every_kind_is_planted():
    assert PLANTED.keys() == KINDS.keys() | {"a secret by name"}


@pytest.mark.parametrize(
    "text",
    ["token = 'None'", "https://example.org:8888/tree", "token: 'aaaaaaaaaaaaaaaaaaaa'", "digest = '0f' * 32",
     "-----BEGIN CERTIFICATE-----", "password = getpass()", "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=",
     "d88fe6b6f23eb6b2d5d7f0a5a4b1c3e9d8f7a6b5", "git@github.com:owner/name.git"],
)  # fmt: skip
def test_what_is_no_secret_passes(text):
    assert secrets(text) == []
