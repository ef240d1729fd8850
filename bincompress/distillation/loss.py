"""How far are the student's predictions from the teacher's? Cross-entropy, with more weight on ambiguous tokens."""

from torch import Tensor


def deviation_aware(teacher: Tensor, student: Tensor, lam: float, gamma: float) -> Tensor:
    """Return DB-LLM's loss (arXiv 2402.11960) of each token, (n,), for logits (n, vocab).

    loss = CE + lam * H_t ** gamma * H_s ** (1 - gamma) * CE, with H the entropies of both predictions in nats; the
    weight carries no gradient. lam = 0 is plain distillation.
    """
    expected, found = teacher.log_softmax(-1), student.log_softmax(-1)
    probabilities = expected.exp()
    cross = -(probabilities * found).sum(-1)
    if not lam:
        return cross
    teacher_entropy = -(probabilities * expected).sum(-1)
    fixed = found.detach()
    student_entropy = -(fixed.exp() * fixed).sum(-1)
    # Rounding can make the entropy of a certain prediction a little negative, and its power NaN.
    ambiguity = teacher_entropy.clamp_min(0) ** gamma * student_entropy.clamp_min(0) ** (1 - gamma)
    return (1 + lam * ambiguity) * cross
