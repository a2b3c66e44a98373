"""The terms of a round as bytes that are signed: written, checked, read. No I/O but the import of a library.

`cryptography` is imported where a signature is made or checked: a board that takes no part in rounds never
loads it. Ed25519 as in RFC 8032; a key is its 32 raw bytes, in files and configurations as hexadecimal.
"""

from __future__ import annotations

from typing import Final

import msgspec

from edge_cascade.errors import ProtocolError
from edge_cascade.messages import RoundTerms

MILLION: Final = 1_000_000
KEY_BYTES: Final = 32
MAX_EPOCHS: Final = 1_000
_PREFIX: Final = b"edge-daemon round 1\0"
"""So that a signature of this key means nothing anywhere else."""

_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(RoundTerms)


def encode_terms(terms: RoundTerms) -> bytes:
    """The bytes that are signed and travel.

    Raises:
        ProtocolError: for terms that no board would take.
    """
    _check(terms)
    return _encode(terms)


def decode_terms(data: bytes) -> RoundTerms:
    """The terms in an offer.

    Raises:
        ProtocolError: for anything that is none, or contradicts itself.
    """
    try:
        terms = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"round terms: {error}") from error
    _check(terms)
    return terms


def sign_terms(data: bytes, private_key: bytes) -> bytes:
    """The 64 bytes of the signature of encoded terms."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(private_key).sign(_PREFIX + data)


def is_signed(data: bytes, signature: bytes, public_key: bytes) -> bool:
    """Whether the holder of the key that belongs to `public_key` signed these terms."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _PREFIX + data)
    except (InvalidSignature, ValueError):
        return False
    return True


def public_key_of(private_key: bytes) -> bytes:
    """The public half of a private key, 32 bytes."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()


def _check(terms: RoundTerms) -> None:
    problems = (
        (not 1 <= terms.epochs <= MAX_EPOCHS, f"{terms.epochs} epochs, 1 to {MAX_EPOCHS} are possible"),
        (terms.batch_size < 1, "batches of no examples"),
        (not 0 < terms.learning_rate_ppm <= 1000 * MILLION, f"learning rate {terms.learning_rate_ppm} ppm"),
        (terms.momentum_ppm >= MILLION, "a momentum of 1 never forgets"),
        (not 0 < terms.min_examples <= terms.max_examples, "min_examples is not in 1..max_examples"),
        (
            terms.encoding == "topk" and not 0 < terms.top_share_ppm <= MILLION // 2,
            f"top share {terms.top_share_ppm} ppm, above 0 to {MILLION // 2} are possible",
        ),
        (
            # What the noise hid would come back with the next update.
            terms.noise_multiplier_ppm > 0 and terms.encoding in {"sign", "topk"},
            f"noise for privacy and error feedback ({terms.encoding}) exclude each other; use fp32 or int8",
        ),
        (
            terms.noise_multiplier_ppm > 0 and terms.clip_norm_ppm == 0,
            "noise without a clipping norm hides nothing",
        ),
    )
    for is_wrong, why in problems:
        if is_wrong:
            raise ProtocolError(f"round {terms.round_id!r}: {why}")
