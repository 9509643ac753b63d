"""OLMo-core's dropless layer: its router and experts between Triton's gather and scatter."""

from torch import Tensor, nn

from moe.bench.peers.contender import Contender, Grads, Unavailable, grad
from moe.bench.problem import Problem


class OLMo(Contender):
    """Raises `Unavailable` on CPU: its gather and scatter are Triton kernels."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        shape, x_TD = problem.shape, problem.x_TD
        if not x_TD.is_cuda:
            raise Unavailable("its gather and scatter are Triton kernels, which run on CUDA only")
        from olmo_core.config import DType
        from olmo_core.nn.moe import MoEConfig, MoERouterConfig, MoEType

        config = MoEConfig(
            name=MoEType.dropless,
            num_experts=shape.experts,
            hidden_size=shape.inner,
            router=MoERouterConfig(
                top_k=shape.top_k,
                normalize_expert_weights=1.0,
                uniform_expert_assignment=problem.routing == "forced",
            ),
            lb_loss_weight=None,
            dtype=DType.from_pt(x_TD.dtype),
        )
        self.shape = shape
        self.layer = config.build(shape.hidden, init_device="meta")
        self.layer.router.weight = nn.Parameter(problem.router_ED.flatten())
        self.experts = self.layer.experts.mlp
        self.experts.w1 = nn.Parameter(problem.gate_EFD.flatten(0, 1))
        self.experts.w3 = nn.Parameter(problem.up_EFD.flatten(0, 1))
        self.experts.w2 = nn.Parameter(problem.down_EDF.transpose(1, 2).flatten(0, 1))

    def forward(self, x_TD: Tensor) -> Tensor:
        y_BTD: Tensor = self.layer(x_TD.unsqueeze(0))
        return y_BTD.squeeze(0)

    def choices(self, x_TD: Tensor) -> Tensor:
        ids_BTK: Tensor = self.layer.router(x_TD.unsqueeze(0))[1]
        return ids_BTK.squeeze(0)

    def grads(self) -> Grads:
        sizes = (self.shape.experts, self.shape.inner)
        gate, up, down = (
            grad(weight).unflatten(0, sizes) for weight in (self.experts.w1, self.experts.w3, self.experts.w2)
        )
        router = grad(self.layer.router.weight).view(self.shape.experts, self.shape.hidden)
        return router, gate, up, down.transpose(1, 2)
