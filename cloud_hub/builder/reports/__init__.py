"""What a bundle does on data: evaluation, ablation, bytes on the wire, cards."""
