{{/*
What values.schema.json cannot say, or not in words that help: values that contradict each other. Included by the coordinator's Deployment.
*/}}
{{- define "shardmesh.check" -}}
{{- $shards := int .Values.shards -}}
{{- $power := 1 -}}
{{- range until 20 -}}
{{- if lt $power $shards -}}{{- $power = mul $power 2 | int -}}{{- end -}}
{{- end -}}
{{- if and (ne $power $shards) (not .Values.allowUneven) -}}
{{- fail (printf "shards is %d: a power of two is wanted; set allowUneven=true for any other number" $shards) -}}
{{- end -}}
{{- $model := .Values.model -}}
{{- if and (eq $model.source "existingClaim") (not $model.claim.existing) -}}
{{- fail "model.source is existingClaim: model.claim.existing must name the claim" -}}
{{- end -}}
{{- if and (ne $model.source "existingClaim") (or $model.claim.existing $model.path) -}}
{{- fail (printf "model.claim.existing and model.path belong to model.source=existingClaim, found model.source=%s" $model.source) -}}
{{- end -}}
{{- if and (ne $model.source "existingClaim") (not $model.hubId) -}}
{{- fail (printf "model.source is %s: model.hubId must say which model" $model.source) -}}
{{- end -}}
{{- if and (eq $model.source "hub") (eq $model.delivery "shared") -}}
{{- fail "model.source=hub keeps the files where only the coordinator sees them: set model.delivery=stream, or model.source=newClaim" -}}
{{- end -}}
{{- if and (eq $model.source "hub") (ne $model.revision "main") -}}
{{- fail "model.revision needs model.source=newClaim: at model.source=hub the coordinator takes the hub's main" -}}
{{- end -}}
{{- if and (eq $model.source "newClaim") (eq $model.claim.accessMode "ReadOnlyMany") -}}
{{- fail "model.claim.accessMode=ReadOnlyMany cannot be filled: take ReadWriteOnce or ReadWriteMany" -}}
{{- end -}}
{{- if and .Values.coordinator.warmSpares (eq $model.delivery "stream") -}}
{{- fail "coordinator.warmSpares has spares read files that they mount: it needs model.delivery=shared" -}}
{{- end -}}
{{- if and $model.hubToken.existingSecret $model.hubToken.value -}}
{{- fail "model.hubToken: existingSecret or value, not both" -}}
{{- end -}}
{{- if and (include "shardmesh.severalCoordinators" .) (eq .Values.discovery "dns") -}}
{{- fail "several coordinators need discovery=kubernetes: a Lease says which of them assigns plans" -}}
{{- end -}}
{{- if eq .Values.tls.mode "existing" -}}
{{- if not (and .Values.tls.coordinatorSecret .Values.tls.workerSecret) -}}
{{- fail "tls.mode is existing: tls.coordinatorSecret and tls.workerSecret must name the Secrets" -}}
{{- end -}}
{{- else if or .Values.tls.coordinatorSecret .Values.tls.workerSecret .Values.tls.callerSecret -}}
{{- fail (printf "tls.coordinatorSecret, tls.workerSecret and tls.callerSecret belong to tls.mode=existing, found tls.mode=%s" .Values.tls.mode) -}}
{{- end -}}
{{- if and (eq .Values.tls.mode "off") (or .Values.tls.publicSecret .Values.tls.requireCallerCertificate) -}}
{{- fail "tls.publicSecret and tls.requireCallerCertificate need TLS, found tls.mode=off" -}}
{{- end -}}
{{- if and .Values.apiKeys.existingCallerSecret (not .Values.apiKeys.existingSecret) -}}
{{- fail "apiKeys.existingCallerSecret goes with apiKeys.existingSecret: a key the chart makes has a Secret already" -}}
{{- end -}}
{{- if and (ne .Values.autoscaling.mode "none") (gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- fail (printf "autoscaling.minReplicas is %d, more than maxReplicas, %d" (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- if and (eq .Values.autoscaling.mode "keda") (not .Values.autoscaling.prometheusAddress) -}}
{{- fail "autoscaling.mode is keda: autoscaling.prometheusAddress must say where Prometheus answers" -}}
{{- end -}}
{{- /* The version is asked too, because `helm template` lists every API that helm itself knows. */ -}}
{{- $v2 := and (.Capabilities.APIVersions.Has "autoscaling/v2") (semverCompare ">=1.23-0" .Capabilities.KubeVersion.Version) -}}
{{- if and (eq .Values.autoscaling.mode "hpa") (not $v2) -}}
{{- fail (printf "autoscaling.mode is hpa: it needs autoscaling/v2, from Kubernetes 1.23 on, found %s" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- if not .Values.metrics.enabled -}}
{{- $readers := dict "autoscaling.mode" .Values.autoscaling.mode "metrics.monitor" .Values.metrics.monitor -}}
{{- range $name, $value := merge $readers (dict "metrics.rules" .Values.metrics.rules "metrics.dashboard" .Values.metrics.dashboard) -}}
{{- if not (has $value (list "none" false)) -}}
{{- fail (printf "%s=%v reads metrics: set metrics.enabled=true" $name $value) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- include "shardmesh.check.pods" . -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) -}}
{{- fail "ingress.enabled: ingress.host must be set" -}}
{{- end -}}
{{- if and .Values.grpcRoute.enabled (not .Values.grpcRoute.parentRefs) -}}
{{- fail "grpcRoute.enabled: grpcRoute.parentRefs must name a Gateway" -}}
{{- end -}}
{{- if and .Values.grpcRoute.caConfigMap .Values.tls.publicSecret -}}
{{- fail "grpcRoute.caConfigMap is for the mesh's own certificate, tls.publicSecret puts another in its place: leave one of them" -}}
{{- end -}}
{{- end -}}

{{/* Whether there may be more than one: "true", or nothing. */}}
{{- define "shardmesh.severalCoordinators" -}}
{{- if or (gt (int .Values.coordinator.replicas) 1) (ne .Values.autoscaling.mode "none") -}}true{{- end -}}
{{- end -}}

{{/* What the API server would refuse, in words that name the value. */}}
{{- define "shardmesh.check.pods" -}}
{{- $none := "^0+%?$" -}}
{{- if and (regexMatch $none (toString .Values.worker.maxSurge)) (regexMatch $none (toString .Values.worker.maxUnavailable)) -}}
{{- fail "worker.maxSurge and worker.maxUnavailable are both 0: no worker could ever be replaced" -}}
{{- end -}}
{{- range $component := list "coordinator" "worker" -}}
{{- $resources := (get $.Values $component).resources | default dict -}}
{{- $limits := $resources.limits | default dict -}}
{{- range $name, $request := $resources.requests -}}
{{- $limit := get $limits $name -}}
{{- if and (hasKey $limits $name) (lt (include "shardmesh.amount" $limit | float64) (include "shardmesh.amount" $request | float64)) -}}
{{- fail (printf "%s.resources.limits.%s is %v, less than what is requested, %v" $component $name $limit $request) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $common := .Values.commonLabels | default dict -}}
{{- $added := dict "coordinator.podLabels" .Values.coordinator.podLabels "worker.podLabels" .Values.worker.podLabels -}}
{{- $added = merge $added (dict "metrics.labels" .Values.metrics.labels "metrics.dashboardLabels" .Values.metrics.dashboardLabels) -}}
{{- range $value, $labels := merge (dict "commonLabels" $common) $added -}}
{{- range $label, $_ := $labels -}}
{{- if regexMatch "^(app\\.kubernetes\\.io|helm\\.sh|shardmesh\\.dev)/" $label -}}
{{- fail (printf "%s: %s is a label that the chart sets itself" $value $label) -}}
{{- end -}}
{{- if and (ne $value "commonLabels") (hasKey $common $label) -}}
{{- fail (printf "%s: %s is in commonLabels already" $value $label) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A quantity of Kubernetes as a plain number. */}}
{{- define "shardmesh.amount" -}}
{{- $units := dict "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 -}}
{{- $units = merge $units (dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 "Ei" 1152921504606846976) -}}
{{- if kindIs "string" . -}}
{{- mulf (regexFind "^[0-9.]+" . | float64) (get $units (regexFind "[A-Za-z]+$" .) | default 1) -}}
{{- else -}}
{{- float64 . -}}
{{- end -}}
{{- end -}}
