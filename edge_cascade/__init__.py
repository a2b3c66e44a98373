"""What device and hub must agree on: messages, bundles, scores, gate, plans and the ladder."""
