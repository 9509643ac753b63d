"""Parameters of a sparse layer -> the fields that hold them in the reference."""

REFERENCE = {
    "router.weight": "router_ED",
    "router.bias": "router_bias_E",
    "experts.gate_up": "gate_up_E2FD",
    "experts.gate_up_bias": "gate_up_bias_E2F",
    "experts.down": "down_EDF",
    "experts.down_bias": "down_bias_ED",
    "to_latent.weight": "to_latent_LD",
    "from_latent.weight": "from_latent_DL",
    "shared_expert.gate.weight": "shared_gate_FD",
    "shared_expert.up.weight": "shared_up_FD",
    "shared_expert.down.weight": "shared_down_DF",
    "shared_expert_gate.weight": "shared_expert_gate_1D",
}
