"""How parameters move: groups with their own rates, schedules, proximal maps onto a grid."""
