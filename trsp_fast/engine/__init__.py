"""How a step is computed: the losses now; memory plans and many devices come here."""
