// Pages without charts of their own: the theme button alone.
"use strict";
report.start();
