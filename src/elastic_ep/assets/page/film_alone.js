"use strict";
new Film(document.getElementById("film"), JSON.parse(document.getElementById("data").textContent));
