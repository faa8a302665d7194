{{/* The spec of an entry: all that is not metadata. A key set to null counts as not given, 0 and
     false are values. Strings that stand for a number or a boolean are converted. */}}
{{- define "models.spec" -}}
{{- $spec := dict "minReplicas" 0 }}
{{- range $key, $value := omit . "enabled" "labels" "annotations" }}
{{- if not (kindIs "invalid" $value) }}
{{- $_ := set $spec $key $value }}
{{- end }}
{{- end }}
{{- include "models.convert" (list $spec "replicas" "minReplicas" "maxReplicas" "targetRequests" "scaleDownDelaySeconds") }}
{{- if hasKey $spec "autoscalingDisabled" }}
{{- $_ := set $spec "autoscalingDisabled" (eq (toString $spec.autoscalingDisabled) "true") }}
{{- end }}
{{- with $spec.loadBalancing }}
{{- include "models.convert" (list . "maxRequestsPerReplica") }}
{{- end }}
{{- with ($spec.loadBalancing | default dict).prefixHash }}
{{- include "models.convert" (list . "meanLoadFactor" "replication" "prefixCharLength") }}
{{- end }}
{{- with $spec.canary }}
{{- include "models.convert" (list . "percent") }}
{{- end }}
{{- toYaml $spec }}
{{- end }}

{{/* Make integers of a map's values in place: (list map key…). */}}
{{- define "models.convert" -}}
{{- $map := first . }}
{{- range $key := rest . }}
{{- if kindIs "string" (index $map $key) }}
{{- $_ := set $map $key (int64 (toString (index $map $key))) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Whether an entry is installed: (list root entry). Gives "yes" or nothing. */}}
{{- define "models.isEnabled" -}}
{{- $all := (index . 0).Values.all | default dict }}{{- $entry := index . 1 | default dict }}
{{- if or (eq (toString $entry.enabled) "true") (and $entry (eq (toString $all.enabled) "true")) }}yes{{ end }}
{{- end }}

{{/* Fail if an entry is neither in the catalogue nor complete: (list root name). An entry that is
     explicitly not enabled is ignored. */}}
{{- define "models.check" -}}
{{- $root := index . 0 }}{{- $name := index . 1 }}
{{- $entry := index $root.Values.catalog $name | default dict }}
{{- $missing := list }}
{{- range $key := list "url" "engine" "features" }}
{{- if kindIs "invalid" (index $entry $key) }}
{{- $missing = append $missing $key }}
{{- end }}
{{- end }}
{{- if and $missing (or (include "models.isEnabled" (list $root $entry)) (not (hasKey $entry "enabled"))) }}
{{- if hasKey $entry "url" }}
{{- fail (printf "catalog.%s: missing %s" $name (join ", " $missing)) }}
{{- end }}
{{- $hint := "" }}
{{- with include "models.nearest" . }}
{{- $hint = printf "; did you mean %s?" . }}
{{- end }}
{{- range $key, $value := $entry }}
{{- if and (kindIs "map" $value) (not (has $key (list "labels" "annotations" "env" "loadBalancing"))) }}
{{- $hint = printf "; with --set, escape the dots of a name: 'catalog.%s\\.%s…'" $name $key }}
{{- end }}
{{- end }}
{{- fail (printf "unknown model in catalog: %s%s (an entry of your own needs url, engine and features)" $name $hint) }}
{{- end }}
{{- end }}

{{/* The entry whose name shares the most sequences of three characters: (list root name). */}}
{{- define "models.nearest" -}}
{{- $name := index . 1 }}
{{- $nearest := "" }}{{- $most := 2 }}{{- $off := 0 }}
{{- range $candidate, $entry := (index . 0).Values.catalog }}
{{- if and $entry (hasKey $entry "url") }}
{{- $shared := 0 }}
{{- range $start := until (max 0 (sub (len $name) 2) | int) }}
{{- if contains (substr $start (add $start 3 | int) $name) $candidate }}
{{- $shared = add1 $shared }}
{{- end }}
{{- end }}
{{- $difference := sub (len $candidate) (len $name) }}
{{- $difference = max $difference (sub 0 $difference) }}
{{- if or (gt (int $shared) (int $most)) (and $nearest (eq (int $shared) (int $most)) (lt (int $difference) (int $off))) }}
{{- $nearest = $candidate }}{{- $most = $shared }}{{- $off = $difference }}
{{- end }}
{{- end }}
{{- end }}
{{- $nearest }}
{{- end }}
