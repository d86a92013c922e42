// Runs an exported model in Node.js:
//
// npm install --ignore-scripts
// node run.mjs [float32 | int8] < texts.jsonl
//
// Each line is a text as a JSON string, or a pair of texts as an array of two. Prints a JSON line
// for each: label, probability, exit (a layer), cost (share of all layers), probabilities of all
// classes.
import { text } from "node:stream/consumers";
import * as ort from "onnxruntime-node";
import { Classifier } from "./classifier.mjs";

try {
  const lines = (await text(process.stdin)).split("\n").filter((line) => line.trim());
  const rows = lines.map((line) => JSON.parse(line));
  const classifier = await Classifier.load(ort, process.argv[2]);
  for (const answer of await classifier.predict(rows)) console.log(JSON.stringify(answer));
} catch (error) {
  console.error(`error: ${error.message}`);
  process.exitCode = 2;
}
