"""Networks of other libraries, given to the samplers and the guidance of this one."""
