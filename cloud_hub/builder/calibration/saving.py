"""Whether a certified policy saves what was asked of it. No I/O."""

from __future__ import annotations

from cloud_hub.builder.calibration.certify import Certified
from cloud_hub.errors import CertificateError


def check_saving(certified: Certified, *, epsilon: float, max_upload: float | None) -> None:
    """Refuse a policy that would send everything, or more than the budget, and show the trade.

    Raises:
        CertificateError: with what each promise is expected to upload.
    """
    upload = certified.plan.points[certified.plan.chosen].upload_share
    table = "; ".join(
        f"{100 * trade.epsilon:g} % costs {100 * trade.upload_share:.1f} % upload"
        for trade in certified.outlook.trades(epsilon)
    )
    if not certified.saves:
        raise CertificateError(
            f"epsilon {epsilon:g} holds only if every sample is sent. Expected at other promises: {table}"
        )
    if max_upload is not None and upload > max_upload:
        needed = certified.outlook.epsilon_for_upload(max_upload)
        raise CertificateError(
            f"epsilon {epsilon:g} needs {100 * upload:.1f} % upload, more than the "
            f"{100 * max_upload:g} % allowed, which take an epsilon of about {needed:.3g}. "
            f"Expected at other promises: {table}"
        )
